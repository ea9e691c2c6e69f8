"""The parts of `bench/gpu.py` that run the local engine: a whole step, and what fits. What its other parts share.

Models are made on the spot: the sizes of Qwen3, random weights, and a tokenizer of as many words as the vocabulary has
tokens, so that a response of random tokens is a text of as many words. Such a model is never right, so verdicts are
planted: every second rollout is a success. Everything else is the engine and the methods as they are.
"""

from __future__ import annotations

import gc
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from bench.cost import Reading, head_flops, layer_parameters
from bench.peak import Peak
from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.architecture import KNOWN, Architecture
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.memory import estimate
from mopd_nemo.engines.local.prefix_tree import build_tree
from mopd_nemo.methods.base import make_method
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.types import Outcome, Problem, Rollout, RolloutGroup, Verdict

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.yaml"
LEARNING_RATE = 1e-12
MODES: dict[str, list[str]] = {
    "full": [],
    "full, layers computed again": ["train.activation_checkpointing=true"],
    "full, 8 bytes a parameter": [
        *("model.dtype=bfloat16", "optimizer.weights=bfloat16", "optimizer.moments=int8"),
        "train.activation_checkpointing=true",
    ],
    "LoRA, rank 16": ["lora.rank=16"],
    "LoRA, layers computed again": ["lora.rank=16", "train.activation_checkpointing=true"],
}
"""Ways to train, as settings."""
Ids = tuple[int, ...]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    model: Architecture
    prompts: int
    rollouts: int
    prompt: int
    """Tokens of each."""
    response: int
    micro_batch: int
    """Tokens."""
    trees: tuple[tuple[int, int], ...]
    """Tokens of a context that eight responses share, and of each response."""
    ladder: dict[str, Architecture]
    """Models to fit, from small to large."""
    limit: int | None = None
    """Bytes that the device is taken to have."""


def _tiny(layers: int) -> Architecture:
    return Architecture(
        layers=layers, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=512, tied=True
    )  # fmt: skip


REAL = Sizes(
    model=KNOWN["Qwen/Qwen3-0.6B"], prompts=8, rollouts=8, prompt=256, response=1024, micro_batch=16384,
    trees=((6144, 1024), (8192, 4096)),
    ladder={f"Qwen3-{size}": KNOWN[f"Qwen/Qwen3-{size}"] for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
)  # fmt: skip
TOY = Sizes(
    model=_tiny(2), prompts=2, rollouts=4, prompt=8, response=12, micro_batch=256, trees=((40, 8),),
    ladder={f"toy-{layers}": _tiny(layers) for layers in (1, 4, 12)}, limit=24_000_000,
)  # fmt: skip


# --------------------------------------------------------------------------------------------- models on the spot


def write_model(directory: Path, model: Architecture) -> Path:
    """A model's config and tokenizer. Its weights are drawn where it is loaded: `random_weights`."""
    Qwen3Config(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.tied,
        max_position_embeddings=40960,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(directory)
    words = ["<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant"]
    words += [f"w{number}" for number in range(len(words), model.vocab)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
    )
    fast.save_pretrained(directory)
    return directory


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Inside, transformers draws a model's weights on the device instead of reading them from its directory."""
    original = AutoModelForCausalLM.from_pretrained

    def drawn(path: str, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)

    AutoModelForCausalLM.from_pretrained = drawn  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = original  # type: ignore[method-assign]


def config_of(directory: Path, sizes: Sizes, device: str, overrides: Sequence[str]) -> Config:
    longest = sizes.prompt + 4 * (sizes.response + 256)
    return load_config(
        QUICKSTART,
        [
            f"model.path={directory}",
            f"model.device={device}",
            f"model.dtype={'bfloat16' if device == 'cuda' else 'float32'}",
            f"data.max_prompt_tokens={2 * sizes.prompt}",
            f"rollout.num_prompts_per_step={sizes.prompts}",
            f"rollout.num_rollouts_per_prompt={sizes.rollouts}",
            f"rollout.max_response_tokens={sizes.response}",
            f"peers.max_peer_tokens={sizes.response}",
            f"peers.max_context_tokens={longest}",
            f"train.tokens_per_micro_batch={sizes.micro_batch}",
            *overrides,
        ],
    )


def clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def flops(model: Architecture, prompts: Sequence[Ids], responses: Sequence[Ids], head: int) -> float:
    """FLOP that a forward pass needs at least: every shared prefix once.

    Args:
        head: times that the LM head is applied to each response token.
    """
    if not prompts:
        return 0.0
    sequences = [prompt + response[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    tree = build_tree(sequences, torch.device("cpu"))
    pairs = float((tree.positions_S + 1).sum())
    rows = sum(map(len, responses))
    body = 2 * layer_parameters(model) * len(tree.ids_S) + 4 * model.layers * model.heads * model.head_dim * pairs
    return body + head * head_flops(model, Reading(1, 1, rows))


# --------------------------------------------------------------------------------------------------- a whole step


def step(sizes: Sizes, device: str, tell: Callable[[Row], None]) -> None:
    """A step of mopd, sdpo and grpo by phase. All learn from the same rollouts, which are drawn once."""
    with tempfile.TemporaryDirectory() as directory, random_weights(device):
        path = write_model(Path(directory), sizes.model)
        groups: list[RolloutGroup] = []
        ways = [(mode, method) for mode in ("full", "LoRA, rank 16") for method in ("mopd", "sdpo", "grpo")]
        for mode, method in [*ways, ("full, 8 bytes a parameter", "mopd")]:
            config = config_of(path, sizes, device, [f"method={method}", *MODES[mode]])
            engine = LocalEngine(config)
            if not groups:
                groups = _sampled(engine, sizes, device, tell)
            _learn(engine, config, groups, sizes, device, f"{method}, {mode}", tell)
            del engine
            clear(device)


def _sampled(engine: LocalEngine, sizes: Sizes, device: str, tell: Callable[[Row], None]) -> list[RolloutGroup]:
    rng = random.Random(0)
    texts = [
        " ".join(f"w{rng.randrange(5, sizes.model.vocab)}" for _ in range(sizes.prompt)) for _ in range(sizes.prompts)
    ]
    messages = [({"role": "user", "content": text},) for text in texts]
    prompts = [engine.chat.prompt_ids(turns) for turns in messages]  # type: ignore[arg-type]

    def draw(tokens: int) -> list[list[Rollout]]:
        return engine.generate(Request(prompts, sizes.rollouts, Sampling(tokens), "gpu"))

    draw(min(16, sizes.response))
    with Peak(device) as peak:
        seconds, rollouts = timed(device, lambda: draw(sizes.response))
    repeated = [prompt for prompt in prompts for _ in range(sizes.rollouts)]
    responses = [rollout.response_ids for found in rollouts for rollout in found]
    tell(
        {
            "what": f"generate, {sizes.prompts} x {sizes.rollouts} x {sizes.response:,}",
            "seconds": seconds,
            "gib": peak.bytes / 2**30,
            "flops": flops(sizes.model, repeated, responses, head=1),
            "note": f"{sum(map(len, responses)) / seconds:,.0f} tokens/s",
        }
    )
    return [_group(i, *whole) for i, whole in enumerate(zip(messages, prompts, rollouts, strict=True))]


def _group(number: int, messages: Any, prompt: Ids, rollouts: Sequence[Rollout]) -> RolloutGroup:
    """A group of which every second rollout is called a success."""
    verdicts = [
        Verdict(float(i % 2 == 0), Outcome.WRONG if i % 2 else Outcome.CORRECT, success=i % 2 == 0)
        for i in range(len(rollouts))
    ]
    return RolloutGroup(Problem(str(number), messages, "", "arithmetic", prompt), tuple(rollouts), tuple(verdicts))


def _learn(
    engine: LocalEngine,
    config: Config,
    groups: Sequence[RolloutGroup],
    sizes: Sizes,
    device: str,
    title: str,
    tell: Callable[[Row], None],
) -> None:
    """Score, update and the teacher's move, each the second time that it is done."""
    batch = make_method(config, engine.chat).build(groups, 1)
    taught = [e for e in batch.examples if e.teacher_prompt_ids is not None]
    learned = sorted({i for term in batch.terms for i in term.examples})
    scored = flops(sizes.model, [e.teacher_prompt_ids or () for e in taught], [e.response_ids for e in taught], head=0)
    members = [batch.examples[i] for i in learned]
    own = flops(sizes.model, [e.prompt_ids for e in members], [e.response_ids for e in members], head=1)
    teacher_head = head_flops(sizes.model, Reading(1, 1, sum(len(e.response_ids) for e in taught)))
    rows: dict[str, Row] = {}
    for _ in range(2):
        for phase, seconds, gib in _phases(engine, batch, device):
            rows[phase] = {"what": f"{title}: {phase}", "seconds": seconds, "gib": gib}
    rows["score"]["flops"], rows["update"]["flops"] = scored, 3 * own + teacher_head
    if not taught:
        del rows["score"], rows["follow"]
    for row in rows.values():
        tell(row)


def _phases(engine: LocalEngine, batch: TrainBatch, device: str) -> Iterator[tuple[str, float, float]]:
    with Peak(device) as peak:
        seconds, (targets, _) = timed(device, lambda: engine.score(batch))
    yield "score", seconds, peak.bytes / 2**30
    with Peak(device) as peak:
        seconds, metrics = timed(device, lambda: engine.update(batch, targets, LEARNING_RATE))
    assert math.isfinite(metrics["loss"]) and not metrics["update/skipped"], metrics
    yield "update", seconds, peak.bytes / 2**30
    with Peak(device) as peak:
        seconds, _ = timed(device, engine.update_teacher)
    yield "follow", seconds, peak.bytes / 2**30


# ----------------------------------------------------------------------------------------------------- what fits


def fits(sizes: Sizes, device: str, tell: Callable[[Row], None]) -> None:
    """For each way to train, the largest model of which two steps fit, by bisection over the ladder."""
    names = list(sizes.ladder)
    for mode, overrides in MODES.items():
        low, high, found, needed = -1, len(names), 0.0, 0.0  # names[low] fits, names[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            fitting = _fitting(sizes, names[middle], device, overrides)
            if fitting is None:
                high = middle
            else:
                low, (found, needed) = middle, fitting
        row: Row = {"what": f"what fits, {mode}", "note": names[low] if low >= 0 else f"not even {names[0]}"}
        if low + 1 < len(names):
            row["note"] += f"; {names[low + 1]} does not"
        if found:
            row["note"] += f"; {needed:.3g} GiB by `mopd estimate` (every response at its limit)"
        tell(row | {"gib": found})


def _fitting(sizes: Sizes, name: str, device: str, overrides: Sequence[str]) -> tuple[float, float] | None:
    """GiB at the peak of two steps of mopd without sampling, measured and estimated. None: they do not fit."""
    model = sizes.ladder[name]
    clear(device)
    try:
        with (
            tempfile.TemporaryDirectory() as directory,
            random_weights(device),
            Peak(device, sizes.limit) as peak,
        ):
            count = max(-(-sizes.micro_batch // sizes.response), 4)
            group = [f"rollout.num_rollouts_per_prompt={count}", "rollout.num_prompts_per_step=1"]
            config = config_of(write_model(Path(directory), model), sizes, device, [*overrides, *group])
            engine = LocalEngine(config)
            batch = make_method(config, engine.chat).build([_made_up(engine, sizes, model)], 1)
            for _ in range(2):
                targets, _ = engine.score(batch)
                engine.update(batch, targets, LEARNING_RATE)
                engine.update_teacher()
        need = estimate(config, model, [], device, 0.0)
        return peak.bytes / 2**30, max(need[phase] for phase in need.phases if phase != "generate") * 1e9 / 2**30
    except torch.OutOfMemoryError:
        return None
    finally:
        engine = batch = targets = None
        clear(device)


def _made_up(engine: LocalEngine, sizes: Sizes, model: Architecture) -> RolloutGroup:
    """One group of random responses, a micro-batch or more."""
    rng = random.Random(0)

    def words(count: int) -> Ids:
        return tuple(rng.randrange(5, model.vocab) for _ in range(count))

    rollouts = []
    for _ in range(engine._config.rollout.num_rollouts_per_prompt):
        ids = words(sizes.response)
        rollouts.append(Rollout(ids, engine.chat.decode(ids), True, (-math.log(model.vocab),) * len(ids)))
    messages = ({"role": "user", "content": engine.chat.decode(words(sizes.prompt))},)
    return _group(0, messages, engine.chat.prompt_ids(messages), rollouts)  # type: ignore[arg-type]
