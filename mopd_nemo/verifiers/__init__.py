"""Verifiers by task name. Each judges a response against a problem's answer.

`VerifierPool` (`pool.py`) is how the rest of the package judges: in parallel, with deadlines, and with errors of a
verifier kept apart from failures of the model.
"""

from __future__ import annotations

from mopd_nemo.config import UserError
from mopd_nemo.config.plugins import load_class
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.verifiers.base import Verifier, of_function

TASKS = {
    "arithmetic": "mopd_nemo.verifiers.answers:ArithmeticVerifier",
    "choice": "mopd_nemo.verifiers.choice:ChoiceVerifier",
    "tool": "mopd_nemo.verifiers.tool:ToolVerifier",
    "math": "mopd_nemo.verifiers.math:MathVerifier",
    "code": "mopd_nemo.verifiers.code:CodeVerifier",
}
"""`task` of a problem: subclasses of `mopd_nemo.verifiers.base.Verifier`."""


SERVED = "mopd_nemo.verifiers.served:ServedVerifier"


def verifier_class(task: str, config: VerifierConfig, key: str = "task") -> type[Verifier]:
    """The verifier of a task: a built-in one, one that `verifier.custom` or `verifier.http` names, or `module:Name`.

    Args:
        key: that names the task, for errors.

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    if task in TASKS and (task in config.custom or task in config.http):
        block = "custom" if task in config.custom else "http"
        raise UserError(f"verifier.{block}.{task}: a built-in task has this name; choose another")
    if task in config.custom:
        return _custom_class(task, config.custom[task].judge)
    if task in config.http:
        return load_class("served", {"served": SERVED}, key)
    known = TASKS | {name: name for name in (*config.custom, *config.http)}
    found = load_class(task, known, key)
    if not hasattr(found, "check_answer"):
        raise UserError(f"{key}={task}: not a Verifier: derive it from mopd_nemo.verifiers.base.Verifier")
    return found


def check_judges(config: VerifierConfig) -> None:
    """Import every judge of the config.

    Raises:
        UserError: one cannot be imported. The message names its key.
    """
    for task in (*config.custom, *config.http):
        verifier_class(task, config)


def _custom_class(task: str, path: str) -> type[Verifier]:
    key = f"verifier.custom.{task}"
    found = load_class(path, {}, key)
    if hasattr(found, "check_answer"):
        return found
    if isinstance(found, type) or not callable(found):
        raise UserError(f"{key}={path}: neither a Verifier nor a function (response, answer, finished)")
    return of_function(found)
