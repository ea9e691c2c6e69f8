"""Verifiers by task name. Each judges a response against a problem's answer.

`VerifierPool` (`pool.py`) is how the rest of the package judges: in parallel, with deadlines, and with errors of a
verifier kept apart from failures of the model.
"""

from __future__ import annotations

from mopd_nemo.config import UserError
from mopd_nemo.config.plugins import load_class
from mopd_nemo.verifiers.base import Verifier

TASKS = {
    "arithmetic": "mopd_nemo.verifiers.answers:ArithmeticVerifier",
    "choice": "mopd_nemo.verifiers.choice:ChoiceVerifier",
    "tool": "mopd_nemo.verifiers.tool:ToolVerifier",
    "math": "mopd_nemo.verifiers.math:MathVerifier",
    "code": "mopd_nemo.verifiers.code:CodeVerifier",
}
"""`task` of a problem: subclasses of `mopd_nemo.verifiers.base.Verifier`."""


def verifier_class(task: str, key: str = "task") -> type[Verifier]:
    """The verifier of a task: a built-in one, or your own, which a problem names as `module:Name`.

    Raises:
        UserError: there is neither.
    """
    found = load_class(task, TASKS, key)
    if not hasattr(found, "check_answer"):
        raise UserError(f"{key}={task}: not a Verifier: derive it from mopd_nemo.verifiers.base.Verifier")
    return found
