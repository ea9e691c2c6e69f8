"""`mopd export`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from mopd_nemo.commands import check_output
from mopd_nemo.config import UserError
from mopd_nemo.files import WriteError, free_space, in_bytes
from mopd_nemo.terminal import Terminal

NOT_THE_MODEL = ("manifest.json", "trainer.json", "optimizer.pt", "teacher")
"""Files of a local engine's checkpoint that are not part of the Hugging Face model."""


def export(
    source: Annotated[Path, typer.Argument(help="A run, whose newest checkpoint is taken, or a checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; it must not exist yet.")],
) -> None:
    """Write the student of a checkpoint as a Hugging Face model, with its tokenizer."""
    if output.exists():
        raise UserError(f"--output {output}: exists; choose a directory that does not")
    check_output(output, "--output", directory=True)
    checkpoint = _checkpoint(source)
    try:
        if (checkpoint / "config.json").is_file():
            shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns(*NOT_THE_MODEL))
        elif (checkpoint / "policy" / "config.yaml").is_file():
            _export_policy(checkpoint, output)
        else:
            raise UserError(f"{checkpoint}: no config.json and no policy/config.yaml in it; name a run or a checkpoint")
    except OSError as error:  # of `copytree`, a list of all files that failed
        free = in_bytes(free_space(output))
        shutil.rmtree(output, ignore_errors=True)
        why = error.strerror or error.args[0][0][2]
        raise WriteError(f"--output {output}: not written: {why}; {free} were free there then") from error
    Terminal().print(f"{output}: the model of {checkpoint}", soft_wrap=True)


def _checkpoint(source: Path) -> Path:
    """The newest intact checkpoint of a run; what is passed over is said."""
    from mopd_nemo.run.checkpoints import checkpoints, fault

    if not (source / "checkpoints").is_dir():
        return source
    found = checkpoints(source / "checkpoints")
    for checkpoint in reversed(found):
        if not (reason := fault(checkpoint)):
            return checkpoint
        Terminal(stderr=True).print(f"{checkpoint} is passed over: {reason}", soft_wrap=True)
    if found:
        raise UserError(f"{source}: none of its checkpoints is intact; put back one that is")
    raise UserError(f"{source}: this run has no checkpoint yet; train.checkpoint_every sets when it writes one")


def _export_policy(checkpoint: Path, output: Path) -> None:
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
    if subprocess.run([*command, str(checkpoint), str(output)], env=os.environ, check=False).returncode:
        raise UserError(
            f"{checkpoint}: not converted, see above; it needs NeMo-RL with Megatron-Bridge, as in its container "
            "(docs/nemo.md)"
        )
