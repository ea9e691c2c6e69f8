"""Classes and functions that a config names: built-in ones by a short name, your own as `module:Name`.

Methods, verifiers and contexts use it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopd_nemo.config.base import UserError
from mopd_nemo.config.peers import SOURCES

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


def recorded_method(name: str) -> Any:
    """The class of a run that is only read: `Method` itself, which uses nothing, where a user's own is not there."""
    try:
        return method_class(name)
    except UserError:
        return load_class("mopd_nemo.methods.base:Method", {}, "method")


def context_function(name: str) -> Any:
    """The function `(group, target) -> [(heading, text), ...]` that `context` names as `module:function`.

    Raises:
        UserError: there is none, or it cannot be called.
    """
    if ":" not in name:
        raise UserError(
            f"context={name}: choose {', '.join(SOURCES)}, or write module:function for a function of your own"
        )
    found = load_class(name, {}, "context")
    if not callable(found):
        raise UserError(f"context={name}: not a function: write one that takes a group and the index of the target")
    return found


def load_class(name: str, built_in: Mapping[str, str], key: str) -> Any:
    """The class or function that a setting names.

    Args:
        name: a key of `built_in`, or `module:Name`. The module is on the Python path or in the working
            directory.
        built_in: short names, each with its `module:Name`.
        key: of the config, used in errors.

    Raises:
        UserError: there is no such class, or its module cannot be imported.
    """
    module, colon, attribute = built_in.get(name, name).partition(":")
    if not colon:
        raise UserError(f"{key}={name}: choose {', '.join(built_in)}, or write module:Name for a class of your own")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{key}={name}: no name of a module and of what it holds: write it as a.b:Name, without spaces")
    here = str(Path.cwd())
    if name not in built_in and here not in sys.path:
        sys.path.append(here)  # a console script, unlike `python -m`, does not search it
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "."):
            raise UserError(
                f"{key}={name}: there is no module {module} on the Python path or in {here}; name one as a.b:Name"
            ) from error
        raise UserError(f"{key}={name}: its module cannot be imported: {type(error).__name__}: {error}") from error
    try:
        return getattr(imported, attribute)
    except AttributeError as error:
        raise UserError(f"{key}={name}: module {module} has no {attribute}") from error
