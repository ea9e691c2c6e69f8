"""`mopd export`: what was trained as a Hugging Face model with a card, here and on a hub."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import typer

from mopd_nemo.commands import check_output
from mopd_nemo.config import UserError
from mopd_nemo.files import WriteError, free_space, in_bytes, write_json, write_text
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.terminal import Terminal

NOT_THE_MODEL = ("manifest.json", "trainer.json", "rollouts.jsonl", "optimizer.pt", "teacher")
"""Files of a local engine's checkpoint that are not part of the Hugging Face model."""
Which = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        help="Of a run: best (by held-out accuracy; where nothing was evaluated, the newest), newest, or a step.",
    ),
]


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run, or one checkpoint.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; it must not exist yet.")
    ] = None,
    checkpoint: Which = "best",
    push: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also upload it to the hub as OWNER/NAME, as a private model.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole model where the checkpoint holds adapters (lora.rank).")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="With --push: a model that everybody can read.")] = False,
) -> None:
    """Write what was trained as a Hugging Face model, with its tokenizer and a model card.

    mopd export runs/quickstart-20260101-120000 --output my-model
    """
    if output is None and push is None:
        raise UserError("say where to: --output DIR, --push OWNER/NAME, or both")
    if public and push is None:
        raise UserError("--public: goes with --push OWNER/NAME")
    if output is not None:
        if output.exists():
            raise UserError(f"--output {output}: exists; choose a directory that does not")
        check_output(output, "--output", directory=True)
    model = trained(source, checkpoint)
    if push is not None:
        _check_hub(push)
    console = Terminal()
    with tempfile.TemporaryDirectory() if output is None else nullcontext() as elsewhere:
        written = output or Path(str(elsewhere)) / "model"
        _write(model, written, merge, name=(push or str(output)).rstrip("/").rpartition("/")[2])
        if output is not None:
            console.print(f"{output}: the model of {model.directory}{model.why}", soft_wrap=True)
            console.print(f"mopd chat {shlex.quote(str(output))}", style="dim", soft_wrap=True)
        if push is not None:
            console.print(f"{_push(written, push, public)}: the model of {model.directory}{model.why}", soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that was trained, or any other model directory."""

    directory: Path
    """A checkpoint of either engine, or a Hugging Face model."""
    run: RunDirectory | None = None
    step: int | None = None
    evaluation: Mapping[str, Any] | None = None
    """Its row of `eval.jsonl`, if that step was evaluated."""
    why: str = ""
    """Why this one was taken, for a line on the screen."""


def trained(source: Path, which: str = "best") -> Trained:
    """The checkpoint that a path stands for. Of a run it must be intact; those that are not are said.

    Args:
        source: a run, a checkpoint, or a Hugging Face model directory.
        which: of a run, `best`, `newest` or a step.

    Raises:
        UserError: it is none of these, or the run has no such checkpoint.
    """
    from mopd_nemo.run.checkpoints import best_saved, checkpoints, step_of

    if (source / "checkpoints").is_dir():
        intact = _intact(source)
        directory = source
    else:
        intact, which, directory = [source], "newest", source.absolute().parent.parent
        if source.absolute() not in checkpoints(directory / "checkpoints"):
            return Trained(source)
    run = _readable(RunDirectory(directory))
    evaluations = run.rows(run.eval_file) if run is not None else []
    by_step = {step_of(path): path for path in intact}
    if which == "best" and run is not None and (metric := _metric(run, evaluations)):
        kept = [row for row in evaluations if row["step"] in by_step]
        if best := best_saved(run.checkpoints, kept, metric):
            value = f"{metric} {best[1][metric]:.1%}"
            return Trained(best[0], run, step_of(best[0]), best[1], f", the best evaluated one kept ({value})")
    if which not in ("best", "newest") and not (which.isdecimal() and int(which) in by_step):
        raise UserError(
            f"--checkpoint {which}: choose best, newest or a step with a checkpoint: {', '.join(map(str, by_step))}"
        )
    step = int(which) if which.isdecimal() else max(by_step)
    evaluation = next((row for row in evaluations if row["step"] == step), None)
    why = ", the newest one: none was evaluated" if which == "best" else ""
    return Trained(by_step[step], run, step, evaluation, why)


def _readable(run: RunDirectory) -> RunDirectory | None:
    """The run, if its settings can be read; weights of an older version's run are a model without a card."""
    if not run.config_file.is_file():
        return None
    try:
        run.read_config()
    except UserError as error:
        Terminal(stderr=True).print(f"no records of the run are used: {error}", style="yellow", soft_wrap=True)
        return None
    return run


def _intact(source: Path) -> list[Path]:
    """The checkpoints of a run that are as they were written; the others are said."""
    from mopd_nemo.run.checkpoints import checkpoints, fault

    faults = {path: fault(path) for path in checkpoints(source / "checkpoints")}
    if not faults:
        raise UserError(f"{source}: this run has no checkpoint yet; train.checkpoint_every sets when it writes one")
    for path, reason in faults.items():
        if reason:
            Terminal(stderr=True).print(f"{path} is passed over: {reason}", soft_wrap=True)
    if all(faults.values()):
        raise UserError(f"{source}: none of its checkpoints is intact; put back one that is")
    return [path for path, reason in faults.items() if not reason]


def _metric(run: RunDirectory, evaluations: list[dict[str, Any]]) -> str | None:
    names = (name for row in evaluations for name in row if name.startswith("mean@") and "/" not in name)
    return run.read_config().train.keep_best or next(names, None)


def _write(model: Trained, output: Path, merge: bool, name: str) -> None:
    checkpoint = model.directory
    try:
        if (checkpoint / "config.json").is_file():
            shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns(*NOT_THE_MODEL))
            if merge:
                _merge_adapters(checkpoint, output)
        elif (checkpoint / "policy" / "config.yaml").is_file():
            _export_policy(checkpoint, output, merge)
        else:
            raise UserError(f"{checkpoint}: no config.json and no policy/config.yaml in it; name a run or a checkpoint")
        if model.run is not None:
            _add_end_tokens(output, model.run.read_config().model.end_tokens)
            from mopd_nemo.analysis.card import model_card, settings_file

            write_text(output / "README.md", model_card(model.run, model.step or 0, name))
            write_text(output / "mopd.yaml", settings_file(model.run.read_config()))
    except OSError as error:  # of `copytree`, a list of all files that failed
        free = in_bytes(free_space(output))
        shutil.rmtree(output, ignore_errors=True)
        why = error.strerror or error.args[0][0][2]
        raise WriteError(f"--output {output}: not written: {why}; {free} were free there then") from error


def _merge_adapters(checkpoint: Path, output: Path) -> None:
    """Make a whole model, in float32, of a copy of adapters. A copy that is whole already stays."""
    import torch

    from mopd_nemo.engines.local.adapters import BASE, WEIGHTS, load_merged
    from mopd_nemo.engines.models import ADAPTER_CONFIG

    if (checkpoint / ADAPTER_CONFIG).is_file():
        for name in (ADAPTER_CONFIG, WEIGHTS, BASE):
            (output / name).unlink(missing_ok=True)
        load_merged(checkpoint, torch.float32).save_pretrained(output)


def _add_end_tokens(output: Path, tokens: tuple[str, ...]) -> None:
    """Responses end elsewhere where they ended in training: `model.end_tokens` become part of the model."""
    if not tokens:
        return
    from mopd_nemo.engines.models import load_tokenizer

    file = output / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    tokenizer = load_tokenizer(str(output), key="--output")
    listed = settings.get("eos_token_id", tokenizer.eos_token_id)
    before = listed if isinstance(listed, list) else [listed]
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    write_json(file, settings | {"eos_token_id": list(dict.fromkeys([*before, *ids]))})


def _export_policy(checkpoint: Path, output: Path, merge: bool) -> None:
    """Export a NeMo-RL checkpoint: copy DTensor's Hugging Face model, or convert Megatron's in its worker's Python."""
    policy = checkpoint / "policy"
    inside = next((policy / "weights").rglob("config.json"), None)
    if inside is not None:
        shutil.copytree(inside.parent, output)
        shutil.copytree(policy / "tokenizer", output, dirs_exist_ok=True)
        return
    from mopd_nemo.engines.nemo.launch import make_package_visible, worker_python

    make_package_visible()
    command = [str(worker_python("megatron") or sys.executable), "-m", "mopd_nemo.engines.nemo.export"]
    words = [str(checkpoint), str(output), *(["merge"] if merge else [])]
    if subprocess.run([*command, *words], env=os.environ, check=False).returncode:
        raise UserError(
            f"{checkpoint}: not converted, see above; it needs NeMo-RL with Megatron-Bridge, as in its container "
            "(docs/nemo.md)"
        )


def _check_hub(name: str) -> None:
    """Find out before the work whether the hub can be written under this name."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error}") from error
    if "/" not in name:
        raise UserError(f"--push {name}: write it as OWNER/{name}")
    with _hub_errors(name):
        HfApi().whoami()


def _push(directory: Path, name: str, public: bool) -> str:
    """Upload a model directory; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(name):
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message=f"{name} by mopd export")
    return str(address)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub or the way to it refuses, as a message with a remedy."""
    try:
        yield
    except Exception as error:  # the client's errors, and those of the library that it sends with
        from huggingface_hub.errors import LocalTokenNotFoundError

        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status == HTTPStatus.UNAUTHORIZED:
            remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        elif status == HTTPStatus.FORBIDDEN:
            remedy = "use a token that may write there"
        else:
            remedy = "try again, or give --output DIR and upload it later with `hf upload`"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--push {name}: {first}; {remedy}") from error
