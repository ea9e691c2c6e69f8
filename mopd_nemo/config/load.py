"""YAML files and `key=value` overrides to a `Config`, with errors that name key, value and remedy."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from mopd_nemo.config.base import ConfigBlock, UserError
from mopd_nemo.config.checks import check, is_unused
from mopd_nemo.config.plugins import method_class
from mopd_nemo.config.schema import Config

logger = logging.getLogger(__name__)
_Block = TypeVar("_Block", bound=ConfigBlock)


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file with dotted overrides; without a file, the defaults with the overrides.

    The files that its `defaults:` names (relative to it) are read first, then the file, then the overrides. An override
    `method=NAME` leaves out what only the file's own method reads, with a warning, so that a file serves to compare
    methods.

    Raises:
        UserError: the file, an override or a value is wrong. The message names it and the remedy.
    """
    source = "the settings" if path is None else str(path)
    return config_from(_read_values(path, overrides), source)


def config_from(values: Mapping[str, Any], source: str) -> Config:
    """A whole config from a mapping. `source` is named in errors.

    Raises:
        UserError: a value is wrong, or two settings exclude each other.
    """
    config = _validate(Config, _with_teacher(values), source)
    try:
        check(config)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return config


def load_section(block: type[_Block], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> _Block:
    """A block of settings from a file of its own, such as the site file."""
    return _validate(block, _read_values(path, overrides), str(path))


def dump_config(config: Config) -> str:
    """Every setting, defaults included, as YAML that `load_config` reads back to the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, with the value that YAML would have."""
    return _flatten(config.model_dump(mode="json"), "")


def changed_settings(before: Config, now: Config) -> list[str]:
    """Settings with another value than before, as `key: old → new`."""
    old, new = flatten(before), flatten(now)
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _with_teacher(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values with the method's default kind of teacher, if they name none."""
    method, teacher = values.get("method", "mopd"), values.get("teacher", {})
    if not isinstance(method, str) or not isinstance(teacher, dict) or "kind" in teacher:
        return values
    return {**values, "teacher": {**teacher, "kind": method_class(method).teachers[0]}}


def _read_values(path: str | os.PathLike[str] | None, overrides: Sequence[str]) -> dict[str, Any]:
    merged = _parse_overrides(overrides)
    if path is not None:
        own = _read(Path(path), ())
        if isinstance(method := merged.get("method"), str):
            _leave_out_unused(own, method, path)
        merged = OmegaConf.merge(own, merged)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path or 'the settings'}: cannot resolve an interpolation: {error}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _leave_out_unused(own: DictConfig, method: str, path: str | os.PathLike[str]) -> None:
    """Remove from a file's settings those of the file's own method that the method named in its place cannot use."""
    replaced = own.get("method", Config.model_fields["method"].default)
    if method == replaced:
        return
    values: Any = OmegaConf.to_container(own)
    unused = [key for key in _flatten(values, "") if is_unused(method, key) and not is_unused(replaced, key)]
    teacher = values.get("teacher", {})
    if teacher.get("kind", method_class(replaced).teachers[0]) not in method_class(method).teachers:
        unused += [f"teacher.{key}" for key in teacher]
    for key in unused:
        logger.warning("method=%s leaves out %s=%s of %s", method, key, OmegaConf.select(own, key), path)
        block, _, name = key.rpartition(".")
        OmegaConf.select(own, block).pop(name)


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


def _validate(block: type[_Block], values: Mapping[str, Any], source: str) -> _Block:
    try:
        return block.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {_explain(item, block)}" for item in error.errors())) from error


def _explain(item: Any, root: type[ConfigBlock]) -> str:
    """One pydantic error as `key=value: reason; remedy`."""
    location = _key_parts(item["loc"], root)
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_did_you_mean(location, root)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message
    return f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _key_parts(location: Sequence[str | int], block: type[ConfigBlock]) -> list[str]:
    """The part of a pydantic location that names a key.

    After a key whose type is a union, pydantic adds the branch that failed, such as `constrained-int`. So the names of
    fields are followed down the tree. Parts after the last field are kept only inside a list or a mapping.
    """
    parts: list[str] = []
    for number, part in enumerate(location):
        field = block.model_fields.get(str(part))
        parts.append(str(part))
        annotation = field.annotation if field else None
        if isinstance(annotation, type) and issubclass(annotation, ConfigBlock):
            block = annotation
            continue
        rest = location[number + 1 :]
        return parts + [str(part) for part in rest if isinstance(part, int) or get_origin(annotation) is dict]
    return parts


def _did_you_mean(location: list[str], block: type[ConfigBlock]) -> str:
    for part in location[:-1]:
        annotation = block.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, ConfigBlock)
        block = annotation
    names = list(block.model_fields)
    close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"; known here: {', '.join(names)}"
