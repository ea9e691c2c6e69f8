"""Checkpoints: written aside, described by a manifest, renamed into place. Only an intact one is ever continued from.

step_000004/     what the engine saved, trainer.json, rollouts in flight, and the manifest: size and hash of every file
.partial-000004  one that is being written
.old-000004      one that is being deleted
damaged-000004   one that a resume has passed over
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mopd_nemo.config import UserError
from mopd_nemo.engines.base import Engine
from mopd_nemo.files import WriteError, cannot_write, file_limit, free_space, in_bytes, write_rows
from mopd_nemo.run.directory import RunDirectory

MANIFEST = "manifest.json"
TRAINER = "trainer.json"
_NAME = re.compile(r"step_(\d{6,})")
_PARTIAL, _OLD, _DAMAGED = ".partial-", ".old-", "damaged-"
_READERS = 8
"""Files that are hashed at the same time. A core hashes about 1 GB/s."""


def save_checkpoint(
    directory: Path,
    step: int,
    engine: Engine,
    state: dict[str, Any],
    rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Path:
    """Write `directory/step_NNNNNN`.

    Args:
        state: of the trainer, as JSON.
        rows: of further files, by name; a file without rows is not written.

    Raises:
        WriteError: it does not fit. Nothing of it is left, and earlier checkpoints stay.
    """
    if problem := lacking(directory, engine):
        raise WriteError(f"{directory / _name(step)}: not written: {problem}")
    partial = directory / f"{_PARTIAL}{step:06d}"
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        engine.save(partial)
        for name, some in (rows or {}).items():
            if some:
                write_rows(partial / name, some)
        (partial / TRAINER).write_text(json.dumps(state))
        _seal(partial, step)
    except Exception as error:
        reason = _storage_fault(partial, error)
        shutil.rmtree(partial, ignore_errors=True)
        if reason:
            raise WriteError(reason) from error
        raise
    final = directory / _name(step)
    if os.path.lexists(final):
        _delete(final)
    partial.rename(final)
    _sync_directory(directory)
    return final


def prune(directory: Path, keep: int, spare: Collection[Path | None] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those to spare."""
    for old in checkpoints(directory)[:-keep]:
        if old not in spare:
            _delete(old)


def best_saved(
    directory: Path, evaluations: Sequence[Mapping[str, Any]], metric: str
) -> tuple[Path, Mapping[str, Any]] | None:
    """Of the evaluations after step 0 whose checkpoint is there, the best by a metric; of equal ones the first.

    Args:
        evaluations: rows of `eval.jsonl`, oldest first.

    Returns:
        Its checkpoint, by name, and its row; None: no evaluation has both the metric and a checkpoint.
    """
    kept = {step_of(path): path for path in checkpoints(directory)}
    rated = [row for row in evaluations if metric in row and row["step"] > 0 and row["step"] in kept]
    best = max(rated, key=lambda row: row[metric], default=None)
    return None if best is None else (kept[best["step"]], best)


def best_checkpoint(run: RunDirectory) -> tuple[Path, Mapping[str, Any]]:
    """The checkpoint that `train.keep_best` has kept, and the row of its evaluation.

    Raises:
        UserError: the run keeps none, has none yet, or it is damaged.
    """
    metric = run.read_config().train.keep_best
    if metric is None:
        raise UserError(f"{run.path}: this run keeps no best checkpoint; set train.keep_best, or name a checkpoint")
    best = best_saved(run.checkpoints, run.rows(run.eval_file), metric)
    if best is None:
        raise UserError(f"{run.path}: no evaluation after step 0 has a checkpoint yet (train.keep_best={metric})")
    if reason := fault(best[0]):
        raise UserError(f"{best[0]}: the best checkpoint by {metric} is not intact: {reason}; name another one")
    return best


def recover(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to continue from: the newest intact one. None: there is none at all.

    What a kill has left half written or half deleted is removed. A damaged checkpoint that is newer is renamed, so that
    it takes no place among those to keep.

    Args:
        say: is told what is passed over, and why.

    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    for pattern in (f"{_PARTIAL}*", f"{_OLD}*"):
        for left in directory.glob(pattern):
            _remove(left)
    found = checkpoints(directory)
    faults: dict[Path, str] = {}
    for path in reversed(found):
        if not (reason := fault(path)):
            break
        faults[path] = reason
    if found and len(faults) == len(found):
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in faults.items())
        raise UserError(
            f"{directory}: no checkpoint is intact ({listed}); put back one that is, or delete this directory to begin "
            "again at step 0"
        )
    for path, reason in faults.items():
        aside = directory / f"{_DAMAGED}{path.name.removeprefix('step_')}"
        _remove(aside)
        path.rename(aside)
        say(f"WARNING: checkpoint {path} is passed over: {reason}; it is now {aside.name}")
    return found[-1 - len(faults)] if found else None


def load_checkpoint(checkpoint: Path, engine: Engine) -> dict[str, Any]:
    """Restore the engine. Returns the trainer's state.

    Raises:
        UserError: the checkpoint is of another model or optimiser than the settings say.
    """
    try:
        engine.load(checkpoint)
    except (RuntimeError, ValueError, OSError) as error:
        if not _is_foreign(error):
            raise
        lines = str(error).strip().splitlines()
        raise UserError(
            f"{checkpoint}: intact, but it does not fit this run's settings: {' '.join(lines[:2])}; resume with the "
            "model, teacher and engine that it was saved with"
        ) from error
    return json.loads((checkpoint / TRAINER).read_text())


def _is_foreign(error: RuntimeError | ValueError | OSError) -> bool:
    """Whether an intact checkpoint was loaded into other weights or another optimiser, as torch words it.

    A missing file is one of another engine. All else is no fault of the checkpoint: no memory, a disk, or a bug.
    """
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError) or "does not appear to have a file named" in str(error)
    return re.search(r"state[_ ]dict|size mismatch|size of tensor a", str(error)) is not None


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints by name, oldest first; they may be damaged. Directories that a person named do not count."""
    named = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in named if path.name == _name(step_of(path))), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def newest_up_to(directory: Path, step: int) -> Path | None:
    """The newest checkpoint of this step or an earlier one."""
    early = [path for path in checkpoints(directory) if step_of(path) <= step]
    return early[-1] if early else None


def newest_step(directory: Path) -> int:
    """The last step with a checkpoint, damaged or not; 0 if there is none. A copy by hand is none of its step."""
    steps = [0]
    for path in checkpoints(directory):
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            if json.loads((path / MANIFEST).read_text())["step"] == step_of(path):
                steps.append(step_of(path))
    return steps[-1]


def fault(checkpoint: Path) -> str:
    """Why a checkpoint is not as it was written. Empty: it is intact. Reads all of its files."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        step = manifest["step"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    if step != step_of(checkpoint):
        return f"it is a copy of step {step}"
    if TRAINER not in files or any("\0" in name for name in files):
        return f"{MANIFEST} is damaged"
    for name, (size, _) in files.items():
        try:
            found = (checkpoint / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != size:
            return f"{name} has {found} bytes, and had {size} when it was written"
    try:
        for name, digest in _hashes(checkpoint, files):
            if digest != files[name][1]:
                return f"{name} does not hold what was written"
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"
    return ""


def lacking(directory: Path, engine: Engine) -> str:
    """What the next checkpoint lacks, judged by the newest one, else by the engine. Empty: nothing that is known."""
    known = checkpoints(directory)[-1:]
    sizes = [file.stat().st_size for path in known for file in path.rglob("*") if file.is_file()]
    sizes = sizes or [engine.checkpoint_bytes()]
    need, free, limit = sum(sizes), free_space(directory), file_limit()
    if need > free:
        return f"a checkpoint needs {in_bytes(need)}, and {in_bytes(free)} are free there: make room"
    if known and limit is not None and max(sizes) > limit:
        return f"its largest file has {in_bytes(max(sizes))}, and this process may write {in_bytes(limit)} (ulimit -f)"
    return ""


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _delete(checkpoint: Path) -> None:
    """Renamed first: a kill leaves no half of a checkpoint under its name."""
    old = checkpoint.with_name(f"{_OLD}{step_of(checkpoint):06d}")
    _remove(old)
    checkpoint.rename(old)
    _remove(old)


def _remove(path: Path) -> None:
    """Whatever has this name: a directory, or a file or link that a person put there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _seal(directory: Path, step: int) -> None:
    """Write the manifest of all files, on disk before it, and give them the permissions that the umask leaves.

    The engine's `save` has returned, so every rank has written its files. They are read back here, by the one process
    that renames the checkpoint: what it hashes is what a resume will see, also on a shared file system.
    """
    names = [str(path.relative_to(directory)) for path in _files(directory)]
    entries = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": digest}
        for name, digest in _hashes(directory, names)
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": entries}, indent=1) + "\n")
    mode = stat.S_IMODE(manifest.stat().st_mode)
    for path in _files(directory):
        with suppress(PermissionError):  # another user's, as of a worker in a container
            path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for folder in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        _sync_directory(folder)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _hashes(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, SHA-256) of each file, several at a time."""

    def digest(name: str) -> tuple[str, str]:
        with (directory / name).open("rb") as file:
            return name, hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(digest, names)


def _storage_fault(partial: Path, error: Exception) -> str:
    """Whether a save failed for want of room, and how. Empty: for another reason.

    Libraries report a full disk in words of their own, or in none. So a file is written there, as a question.
    """
    sizes = [file.stat().st_size for file in _files(partial)]
    written = f"; {in_bytes(sum(sizes))} of the checkpoint were written"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number) in str(error):
            return cannot_write(partial, OSError(number, os.strerror(number))) + written
    limit = file_limit()
    if limit is not None and max(sizes, default=0) >= limit:
        return cannot_write(partial, OSError(errno.EFBIG, os.strerror(errno.EFBIG))) + written
    probe = partial.parent / ".probe"
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as full:
        return cannot_write(partial, full) + written
    finally:
        probe.unlink(missing_ok=True)
    return cannot_write(partial, error) if isinstance(error, OSError) and error.errno is not None else ""


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
