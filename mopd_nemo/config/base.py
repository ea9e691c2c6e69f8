"""The base class of config blocks, types that several blocks use, and the exception for bad input."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class UserError(Exception):
    """Bad input. The message names the key or file, the value, and what to do about it.

    The `mopd` command prints it without a traceback and exits with code 2.
    """


class TeacherError(Exception):
    """A served teacher can no longer be asked, or what it says cannot be used. The message names its url.

    `mopd train` saves the run, prints the message without a traceback and exits with code 5.
    """


class ConfigBlock(BaseModel):
    """A block of the config: frozen, with finite numbers, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


_DURATION = re.compile(r"(?:(\d+)[-:])?(\d{1,2}):(\d{2}):(\d{2})")


def seconds_of(duration: str) -> int:
    """A duration in seconds.

    Args:
        duration: `hours:minutes:seconds`; with days in front, `days-` as Slurm or `days:` as NeMo-RL writes them.

    Raises:
        ValueError: it has another form.
    """
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{duration!r} is not a duration")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_duration(value: Any) -> Any:
    if not isinstance(value, str) or not _DURATION.fullmatch(value):
        raise PydanticCustomError(
            "duration", "write it as hours:minutes:seconds or days-hours:minutes:seconds, such as 4:00:00"
        )
    return value


Duration = Annotated[str, BeforeValidator(_check_duration)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
