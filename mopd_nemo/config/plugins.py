"""Classes that a config names: built-in ones by a short name, your own as `module:Name`.

Methods and verifiers use it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopd_nemo.config.base import UserError

METHODS = {
    "mopd": "mopd_nemo.methods.mopd:Mopd",
    "sdpo": "mopd_nemo.methods.mopd:Sdpo",
    "opd": "mopd_nemo.methods.opd:Opd",
    "gkd": "mopd_nemo.methods.sft:Gkd",
    "grpo": "mopd_nemo.methods.grpo:Grpo",
    "dpo": "mopd_nemo.methods.preference:Dpo",
    "simpo": "mopd_nemo.methods.preference:Simpo",
    "suppress": "mopd_nemo.methods.suppress:Suppress",
    "verified_sft": "mopd_nemo.methods.sft:VerifiedSft",
}
"""`method` of the config: subclasses of `mopd_nemo.methods.base.Method`."""


def method_class(name: str) -> Any:
    """The subclass of `Method` that `method` names.

    Raises:
        UserError: there is none.
    """
    found = load_class(name, METHODS, "method")
    if not hasattr(found, "teachers"):
        raise UserError(f"method={name}: not a Method: derive it from mopd_nemo.methods.base.Method")
    return found


def load_class(name: str, built_in: Mapping[str, str], key: str) -> Any:
    """The class that a setting names.

    Args:
        name: a key of `built_in`, or `module:Name`. The module is on the Python path or in the working
            directory.
        built_in: short names, each with its `module:Name`.
        key: of the config, used in errors.

    Raises:
        UserError: there is no such class.
    """
    module, colon, attribute = built_in.get(name, name).partition(":")
    if not colon:
        raise UserError(f"{key}={name}: choose {', '.join(built_in)}, or write module:Name for a class of your own")
    here = str(Path.cwd())
    if name not in built_in and here not in sys.path:
        sys.path.append(here)  # a console script, unlike `python -m`, does not search it
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name or "."):
            raise  # the module exists, and one that it imports does not
        raise UserError(
            f"{key}={name}: there is no module {module} on the Python path or in {here}; name one as a.b:Name"
        ) from error
    except AttributeError as error:
        raise UserError(f"{key}={name}: module {module} has no {attribute}") from error
