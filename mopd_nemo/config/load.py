"""YAML files and `key=value` overrides into a `Config`, with errors that a person can act on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from mopd_nemo.config import Config
from mopd_nemo.config.base import UserError

_Section = TypeVar("_Section", bound=BaseModel)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files that its `defaults:` names (relative to it), and dotted overrides, in that order.

    Raises:
        UserError: the file, an override or a value is wrong; the message names it and the remedy.
    """
    return load_section(Config, path, overrides)


def load_section(section: type[_Section], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> _Section:
    """The same for any tree of sections."""
    merged = OmegaConf.merge(_read(Path(path), ()), _parse_overrides(overrides))
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: cannot resolve an interpolation: {error}") from error
    return _validated(section, values, source=str(path))


def load_settings(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """As `load_config`; without a file, the defaults and the overrides."""
    if path is not None:
        return load_config(path, overrides)
    return validate(OmegaConf.to_container(_parse_overrides(overrides)), source="overrides")


def validate(values: Any, source: str) -> Config:
    """Check a mapping against the config tree. `source` is the file named in errors."""
    return _validated(Config, values, source)


def _validated(section: type[_Section], values: Any, source: str) -> _Section:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {_explain(item, section)}" for item in error.errors()]
        raise UserError("\n".join(lines)) from error


def dump_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `load_config` reads back to the same config."""
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), path)


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, as it would stand in YAML."""
    return _flatten(config.model_dump(mode="json"), "")


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _read(path: Path, above: tuple[Path, ...]) -> DictConfig:
    resolved = path.resolve()
    if resolved in above:
        raise UserError(f"{path}: its `defaults:` lead back to itself; remove the circle")
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        own = OmegaConf.load(path)
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(own, DictConfig):
        raise UserError(f"{path}: must hold a mapping of settings at the top level")
    parents = own.pop("defaults", [])
    parents = [parents] if isinstance(parents, str) else list(parents)
    inherited = [_read(path.parent / parent, (*above, resolved)) for parent in parents]
    merged = OmegaConf.merge(*inherited, own)
    assert isinstance(merged, DictConfig)
    return merged


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise UserError(f"override {item!r}: write it as key=value, for example peers.failures=0")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"overrides {' '.join(overrides)!r}: {error}") from error


def _explain(item: Any, root: type[BaseModel]) -> str:
    """One pydantic error as `key=value: reason; remedy`."""
    location = [str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-", "literal"))]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_did_you_mean(location, root)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message
    return f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _did_you_mean(location: list[str], section: type[BaseModel]) -> str:
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    names = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"; known here: {', '.join(names)}"
