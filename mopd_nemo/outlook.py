"""What a run would use, need and show, found without reading weights: for `mopd train --dry-run` and `mopd init`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from mopd_nemo.chat import Chat, with_prompt_ids
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.checks import teacher_prompt
from mopd_nemo.config.plugins import method_class
from mopd_nemo.config.teacher import key_of
from mopd_nemo.data.load import judgeable, load_problems, num_available, num_without_privileged, with_teachers
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.engines import check_adapters, estimate_memory
from mopd_nemo.engines.architecture import architecture_of
from mopd_nemo.engines.local.memory import at_least, checkpoint_bytes, trained_parameters
from mopd_nemo.engines.memory import shortage
from mopd_nemo.engines.models import check_positions, check_vocabularies, load_chat, load_model_config
from mopd_nemo.engines.served import ServedTeacher
from mopd_nemo.files import DamagedError, free_space, in_bytes
from mopd_nemo.methods.base import make_method
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.types import Outcome, Problem, Rollout, RolloutGroup, Verdict
from mopd_nemo.verifiers.pool import VerifierPool

_PEER = "(here would stand a whole {} of this group)"


@dataclass
class Outlook:
    """What was found, and what would stop the run."""

    lines: list[str] = field(default_factory=list)
    prompt: str = ""
    """The first problem as the student reads it."""
    context: str = ""
    """The same as a teacher would read it, with stand-ins for the peers."""
    errors: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep an error and go on."""
        try:
            yield
        except (UserError, DamagedError) as error:
            if str(error) not in self.errors:
                self.errors.append(str(error))


def look_ahead(config: Config) -> Outlook:
    """Resolve and check everything but the weights."""
    found = Outlook()
    chat: Chat | None = None
    with found.collecting():
        run = RunDirectory.at(config)
        above = next(path for path in (run.path, *run.path.absolute().parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"run_dir={run.path}: cannot write in {above}; choose another run_dir")
    found.lines += summary(config, run.path if not found.errors else Path(config.run_dir or "."))
    with found.collecting():
        _check_models(config)
        found.errors += _room(config, found.lines.append)
    with found.collecting():
        chat = load_chat(config.model)
        size = load_model_config(config.model.path, key="model.path").get_text_config().vocab_size
        for name, teacher in config.every_teacher.items():
            if teacher.kind == "server":
                with found.collecting():
                    ServedTeacher(config, name, chat, size)
    problems = {}
    for split in ("train", "eval") if config.train.eval_every else ("train",):
        with found.collecting():
            problems[split] = load_problems(config, split)
            with VerifierPool(config.verifier, {problem.task for problem in problems[split]}) as verifiers:
                problems[split] = judgeable(problems[split], verifiers, config, split)
            if split == "train":
                problems[split] = with_teachers(problems[split], config)
                found.lines += privileged_texts(config, problems[split])
            if chat is not None:
                problems[split] = tokenized(problems[split], chat, config)
                lengths = [len(problem.prompt_ids) for problem in problems[split]]
                found.lines.append(f"prompts     {split}: {min(lengths)} to {max(lengths)} tokens")
    size = config.rollout.num_prompts_per_step
    if 0 < len(problems.get("train", [])) < size:
        found.errors.append(
            f"rollout.num_prompts_per_step={size} is more than the {len(problems['train'])} problems of "
            f"data.train={config.data.train}: lower it or add problems"
        )
    elif chat is not None and "train" in problems:
        with found.collecting():
            found.prompt, found.context = _shown(config, chat, problems["train"][0])
    return found


def summary(config: Config, directory: Path, start: str = "the beginning") -> list[str]:
    """What a run begins with: directory, model, problems used of those there, method, where it goes on from."""
    used = []
    for split, limit in (("train", config.data.num_train), ("eval", config.data.num_eval)):
        if split == "train" or config.train.eval_every:
            source = config.data.train if split == "train" else config.data.eval
            there = num_available(source, split)
            used.append(f"{min(limit or there, there)} of the {there} of data.{split}={source}")
    reads = f", teachers read {config.teacher_reads}" if method_class(config.method).reads_peers else ""
    steps, rollout = config.train.num_steps, config.rollout
    return [
        f"run         {directory}",
        f"model       {config.model.path} ({config.model.dtype}, engine {config.engine}, {_device(config)})",
        f"problems    {'; '.join(used)}",
        f"method      {config.method}, teacher {_teachers(config)}{reads}",
        f"steps       {steps} of {rollout.num_prompts_per_step} problems x {rollout.num_rollouts_per_prompt} rollouts, "
        f"up to {rollout.max_response_tokens} tokens each, learning rate {config.optimizer.learning_rate:g}",
        f"from        {start}",
    ]


def privileged_texts(config: Config, problems: Sequence[Problem]) -> list[str]:
    """A line on training problems without privileged text, where the context names it and some have none."""
    without = num_without_privileged(problems)
    if "privileged" not in config.context or not without:
        return []
    return [f"privileged  {without} of {len(problems)} problems have no text in {config.data.privileged_column}"]


def _teachers(config: Config) -> str:
    """Kind and place of each."""
    found = []
    for name, teacher in config.every_teacher.items():
        place = teacher.path or " and ".join(teacher.urls)
        found.append(" ".join(part for part in (name, teacher.kind, place) if part))
    return ", ".join(found)


def tokenized(problems: Sequence[Problem], chat: Chat, config: Config) -> list[Problem]:
    """Problems with their prompts, as a run makes them."""
    escape = config.data.escape_control_tokens
    return with_prompt_ids(problems, chat, config.data.max_prompt_tokens, escape_control_tokens=escape)


def num_parameters(path: str) -> int:
    """Parameters of a model directory, from the headers of its safetensors; 0: unknown, as of a hub name."""
    from safetensors import safe_open

    total = 0
    for file in Path(resolve_model_path(path)).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in list(tensors.keys()):
                total += math.prod(tensors.get_slice(name).get_shape())
    return total


def free_memory(config: Config) -> int:
    """Bytes free on the device of the local engine: of the GPU, or of this machine's memory."""
    import torch

    from mopd_nemo.engines.local.model import resolve_device

    device = resolve_device(config.model.device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _free_on_host()


def _free_on_host() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory(config: Config) -> tuple[str, float]:
    """`cuda` or `cpu`, and its GB.

    Raises:
        UserError: a cluster's GPUs are not here.
    """
    if config.engine == "nemo":
        raise UserError("--card here: engine=nemo is not on this machine: name its card, as in --card H100")
    import torch

    from mopd_nemo.engines.local.model import resolve_device

    device = resolve_device(config.model.device)
    if device.type == "cuda":
        return device.type, torch.cuda.mem_get_info(device)[1] / 1e9
    return device.type, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _device(config: Config) -> str:
    if config.engine == "nemo":
        return f"{config.nemo.num_nodes} x {config.nemo.gpus_per_node} GPUs"
    from mopd_nemo.engines.local.model import resolve_device

    return str(resolve_device(config.model.device))


def _check_models(config: Config) -> None:
    response = config.rollout.max_response_tokens
    model = load_model_config(config.model.path, key="model.path").get_text_config()
    check_positions(model, "model.path", "data.max_prompt_tokens", config.data.max_prompt_tokens, response)
    for name, teacher in config.every_teacher.items():
        own = model
        if teacher.path is not None:
            key = f"{key_of(name)}.path"
            check_vocabularies(config.model.path, teacher.path, key)
            own = load_model_config(teacher.path, key=key).get_text_config()
        if teacher.kind not in ("none", "server"):
            check_positions(own, "the teacher", *teacher_prompt(config), response)
    check_adapters(config)


def _room(config: Config, say: Callable[[str], None]) -> Iterator[str]:
    """What a run takes of memory and disk. Yields what cannot fit."""
    yield from memory(config, say)
    count = num_parameters(config.model.path)
    if config.engine == "nemo" or not count:
        return
    sizes = architecture_of(config.model.path) if config.lora.rank else None
    trained = trained_parameters(config, sizes) if sizes else 0 if config.lora.rank else count
    saved = checkpoint_bytes(config, trained) * (
        config.train.keep_checkpoints + 1 + (config.train.keep_best is not None)
    )
    place = Path(config.run_dir or "runs")
    say(f"disk        {in_bytes(saved)} for checkpoints; {in_bytes(free_space(place))} are free at {place}")
    if saved > free_space(place):
        yield (
            f"train.keep_checkpoints={config.train.keep_checkpoints}: checkpoints take {in_bytes(saved)}, and "
            f"{in_bytes(free_space(place))} are free at {place}: make room, or choose another run_dir"
        )


def memory(config: Config, say: Callable[[str], None], phases: Sequence[str] = ()) -> Iterator[str]:
    """The memory of a run on this machine's device, by the estimate of `mopd estimate`. Yields what cannot fit.

    What only may not fit, because not every response is as long as it may be, is said.

    Args:
        phases: those that take place. Default: all.
    """
    if config.engine == "nemo":
        return
    free, device = free_memory(config), _device(config).split(":")[0]
    need = estimate_memory(config, device, free / 1e9)
    if need is not None:
        need = replace(need, phases={name: need.phases[name] for name in need.phases if not phases or name in phases})
        say(f"memory      {in_bytes(round(need.peak * 1e9))} at most, in {need.fullest}; {in_bytes(free)} are free")
        for line in shortage(need, free / 1e9):
            say(f"            {line}: see `mopd estimate`")
        if need.host and not phases:
            host, left = in_bytes(round(need.host * 1e9)), in_bytes(_free_on_host())
            say(f"            {host} of host memory for what is offloaded; {left} are free")
    count = num_parameters(config.model.path)
    certain = round(at_least(config, count).peak * 1e9)
    if not phases and certain > free:
        yield (
            f"model.path={config.model.path}: weights, gradients, optimiser and teacher take {in_bytes(certain)}, and "
            f"{in_bytes(free)} are free: choose a smaller model, teacher.kind=live, on a GPU "
            "teacher.offload=true, optimizer.moments=int8, or engine=nemo on several GPUs"
        )


def _shown(config: Config, chat: Chat, problem: Problem) -> tuple[str, str]:
    """The prompt of the student and one of a teacher, for a group that is half right."""
    rollouts, verdicts = [], []
    for number in range(config.rollout.num_rollouts_per_prompt):
        right = number % 2 == 0
        text = f"{_PEER.format('success' if right else 'failure')} [{number}]"
        rollouts.append(Rollout((*chat.encode(text), chat.tokenizer.eos_token_id), text, True, ()))
        outcome = Outcome.CORRECT if right else Outcome.WRONG
        verdicts.append(Verdict(float(right), outcome, success=right))
    group = RolloutGroup(problem, tuple(rollouts), tuple(verdicts))
    prompt = chat.decode(problem.prompt_ids, skip_special_tokens=False)
    if not method_class(config.method).reads_peers:
        return prompt, ""
    contexts = make_method(config, chat).build([group], 1).contexts
    texts = [chat.decode(c.prompt_ids, skip_special_tokens=False) for c in (contexts or [[]])[0] if c.prompt_ids]
    return prompt, texts[-1] if texts else ""
