"""The base class of the config's blocks, and the one exception that a user is meant to read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class UserError(Exception):
    """Bad input. The message names the key or file, the value, and what to do about it.

    The `mopd` command prints it without a traceback and exits with code 2.
    """


class Section(BaseModel):
    """A block of the config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
