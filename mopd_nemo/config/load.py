"""YAML files and `key=value` overrides to a `Config`, with errors that name key, value and remedy."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from mopd_nemo.config.base import ConfigBlock, UserError
from mopd_nemo.config.checks import check, idle_settings, is_unused
from mopd_nemo.config.plugins import method_class
from mopd_nemo.config.schema import Config
from mopd_nemo.files import DamagedError, read_text, reason_of

logger = logging.getLogger(__name__)
_Block = TypeVar("_Block", bound=ConfigBlock)
COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class _Values:
    """Settings as they were read, and where each was given."""

    values: dict[str, Any]
    source: str
    """Of what has no origin, such as a rule between settings."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """By dotted key, the file or the command line that gave it, in the order in which these are read."""

    def where(self, key: str) -> str:
        """Who gave a key, a key below it, or a block with it."""
        while key:
            given = [origin for name, origin in self.origins.items() if f"{name}.".startswith(f"{key}.")]
            if given:
                return given[-1]
            key = key.rpartition(".")[0]
        return self.source

    def is_older(self, key: str, than: str) -> bool:
        """Whether a file gave one key, and another file or the command line after it the other."""
        given = [(name, origin) for name, origin in self.origins.items() if f"{key}.".startswith(f"{name}.")]
        if not given or than not in self.origins or self.origins[than] == given[-1][1]:
            return False
        order = list(self.origins)
        return order.index(given[-1][0]) < order.index(than)

    def who(self, message: str) -> str:
        """Who gave the first setting that a message names and the command line has; else the only file of them all."""
        # A word with a dot is a key or a block, also without a value behind it; one without may be plain English.
        words = re.findall(r"[a-z_]+(?:\.\w+)*(?==)|[a-z_]+(?:\.\w+)+", message)
        below = [(f"{key}.", f"{name}.") for key in words for name in self.origins]
        given = {key for key, name in below if name.startswith(key) or key.startswith(name)}
        named = [self.where(key) for key in words if f"{key}." in given]
        if COMMAND_LINE in named:
            return COMMAND_LINE
        return named[0] if len(set(named)) == 1 else self.source


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file with dotted overrides; without a file, the defaults with the overrides.

    The files that its `defaults:` names (relative to it) are read first, then the file, then the overrides. An override
    `method=NAME` leaves out what only the file's own method reads, with a warning, so that a file serves to compare
    methods. What a file gives for a setting that is replaced after it, such as its peers for its `context`, is left out
    likewise.

    Raises:
        UserError: the file, an override or a value is wrong. The message names it and the remedy.
    """
    return _config(_read_values(path, overrides))


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The settings that a run has recorded, for reading what it did: what they name of the user's need not be there.

    Raises:
        UserError: as above, but for rules between settings.
    """
    return _validate(Config, _read_values(path, overrides))


def config_from(values: Mapping[str, Any], source: str) -> Config:
    """A whole config from a mapping. `source` is named in errors.

    Raises:
        UserError: a value is wrong, or two settings exclude each other.
    """
    return _config(_Values(dict(values), source))


def _config(read: _Values) -> Config:
    try:
        config = _validate(Config, replace(read, values=_with_method(read.values)))
        if overruled := _overruled(config, read):
            return _config(replace(read, values=reduce(_without, overruled, read.values)))
        check(config)
    except ValueError as error:
        raise UserError(f"{read.who(str(error))}: {error}") from error
    return config


def _overruled(config: Config, read: _Values) -> list[str]:
    """Keys that a file gives and that have no effect beside what is read after it, such as peers before a `context`.

    Says so.
    """
    found = []
    for key, value, beside, _ in idle_settings(config):
        if read.is_older(key, beside.partition("=")[0]):
            logger.warning("%s leaves out %s=%s of %s", beside, key, value, read.where(key))
            found.append(key)
    return found


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The values without one, given by its dotted key."""
    name, dot, below = key.partition(".")
    return {n: _without(v, below) if n == name and dot else v for n, v in values.items() if n != name or dot}


def load_section(block: type[_Block], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> _Block:
    """A block of settings from a file of its own, such as the site file."""
    return _validate(block, _read_values(path, overrides))


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


def _with_method(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the method's own defaults beneath: its kind of teacher, and its preset."""
    method = values.get("method", Config.model_fields["method"].default)
    if not isinstance(method, str):
        return values
    kind = "several" if values.get("teachers") else method_class(method).teachers[0]
    for key, default in {"teacher.kind": kind, **method_class(method).preset}.items():
        block, _, name = key.rpartition(".")
        section = values.get(block, {}) if block else values
        if isinstance(section, dict) and name not in section:
            values = {**values, block: {**section, name: default}} if block else {**values, name: default}
    return values


def _read_values(path: str | os.PathLike[str] | None, overrides: Sequence[str]) -> _Values:
    merged, origins = _parse_overrides(overrides)
    source = COMMAND_LINE if path is None else str(path)
    try:
        if path is not None:
            own, of_files = _read(Path(path), ())
            if isinstance(method := merged.get("method"), str):
                _leave_out_unused(own, method, path)
            merged, origins = OmegaConf.merge(own, merged), _later(of_files, origins)
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a block meets a list
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return _Values({str(key): value for key, value in values.items()}, source, origins)


def _leave_out_unused(own: DictConfig, method: str, path: str | os.PathLike[str]) -> None:
    """Remove from a file's settings those of the file's own method that the method named in its place cannot use.

    So are those that either method has a default of its own for.
    """
    replaced = own.get("method", Config.model_fields["method"].default)
    if method == replaced:
        return
    values: Any = OmegaConf.to_container(own)
    presets = method_class(method).preset.keys() | method_class(replaced).preset.keys()
    unused = [
        key
        for key in _flatten(values, "")
        if key in presets or (is_unused(method, key) and not is_unused(replaced, key))
    ]
    teacher = values.get("teacher", {})
    if teacher.get("kind", method_class(replaced).teachers[0]) not in method_class(method).teachers:
        unused += [f"teacher.{key}" for key in teacher]
    for key in unused:
        logger.warning("method=%s leaves out %s=%s of %s", method, key, OmegaConf.select(own, key), path)
        block, _, name = key.rpartition(".")
        (OmegaConf.select(own, block) if block else own).pop(name)


def _read(path: Path, above: tuple[Path, ...]) -> tuple[DictConfig, dict[str, str]]:
    """The settings of a file and of those that its `defaults:` names, and which file gave each."""
    resolved = path.resolve()
    if resolved in above:
        raise UserError(f"{path}: its `defaults:` lead back to itself; remove the circle")
    own = read_yaml(path)
    if own is None:
        own = {}
    if not isinstance(own, dict):
        raise UserError(f"{path}: must hold a mapping of settings at the top level, as in `seed: 1`")
    parents = own.pop("defaults", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: defaults={parents!r}: name a file beside this one, or several as [a.yaml, b.yaml]")
    merged, origins = OmegaConf.create(), {}
    try:
        for parent in parents:
            inherited, given = _read(path.parent / parent, (*above, resolved))
            merged, origins = OmegaConf.merge(merged, inherited), _later(origins, given)
        merged = OmegaConf.merge(merged, OmegaConf.create(own))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return merged, _later(origins, dict.fromkeys(_flatten(own, ""), str(path)))


def _later(origins: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Origins with those of what is read after them, which stand last."""
    return {key: origin for key, origin in origins.items() if key not in given} | dict(given)


def _parse_overrides(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """The settings of `key=value` items, and that the command line gave them."""
    merged, origins = OmegaConf.create(), {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"override {item!r}: write it as key=value, for example peers.failures=0")
        try:
            OmegaConf.update(merged, key, _parse_yaml(text), force_add=True)
        except (ValueError, OmegaConfBaseException) as error:
            raise UserError(f"override {item!r}: {str(error).splitlines()[0].lstrip(': ')}") from error
        origins[key] = COMMAND_LINE
    return merged, origins


_PLAIN = {
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+"),
    "float": (
        "-+.0123456789",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
    ),
}
"""First characters and form of what is no text without quotes, beside null. YAML 1.1, which most libraries read, also
makes 14400 of `4:00:00`, `false` of `off` and 8 of `010`; and it does not read `1e-4` as a number."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it. A key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in pairs if tag.rpartition(":")[2] not in (*_PLAIN, "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_first, _form) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_form})$"), list(_first))


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; None for an empty one.

    Raises:
        UserError: there is no such file, it is not text, or not YAML. The message names the line.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a directory' if path.is_dir() else 'no such config file'}; name a YAML file")
    try:
        return _parse_yaml(read_text(path))
    except DamagedError as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"{path}{error}") from error


def _parse_yaml(text: str) -> Any:
    """The value of YAML text.

    Raises:
        ValueError: it is not YAML. The message begins with the line: `, line 3: ...`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f": not valid YAML: {error}") from error


def _validate(block: type[_Block], read: _Values) -> _Block:
    try:
        return block.model_validate(read.values)
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for item in error.errors():
            subject, reason = _explain(item, block)
            where = read.where(".".join(_key_parts(item["loc"], block))) if subject else read.who(reason)
            lines.setdefault(f"{where}: {subject}", []).append(reason)
        raise UserError("\n".join(start + " or ".join(reasons) for start, reasons in lines.items())) from error


def _explain(item: Any, root: type[ConfigBlock]) -> tuple[str, str]:
    """One pydantic error as `key=value: ` and its reason with the remedy. A rule between keys names them itself."""
    location = _key_parts(item["loc"], root)
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}", _did_you_mean(location, root)
    if item["type"] == "value_error":
        reason = reason_of(item)
        return "", reason.replace("teacher.", f"teachers.{location[1]}.") if location[:1] == ["teachers"] else reason
    if item["type"] == "missing":
        return f"{key}: ", reason_of(item)
    shown = repr(item["input"])
    return f"{key}={shown if len(shown) <= 80 else f'{shown[:77]}...'}: ", reason_of(item)


def _key_parts(location: Sequence[str | int], block: type[ConfigBlock]) -> list[str]:
    """The part of a pydantic location that names a key.

    After a key whose type is a union, pydantic adds the branch that failed, such as `constrained-int`. So the names of
    fields are followed down the tree. Parts after the last field are kept only inside a list or a mapping.
    """
    parts: list[str] = []
    annotation: Any = block
    for number, part in enumerate(location):
        annotation = _below(annotation, str(part))
        parts.append(str(part))
        if get_origin(annotation) is dict and _is_block(get_args(annotation)[1]):
            continue
        if _is_block(annotation):
            continue
        rest = location[number + 1 :]
        return parts + [str(part) for part in rest if isinstance(part, int) or get_origin(annotation) is dict]
    return parts


def _below(annotation: Any, part: str) -> Any:
    """The type of what a block or a mapping has under a name; None where it has nothing."""
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    field = annotation.model_fields.get(part) if _is_block(annotation) else None
    return field.annotation if field else None


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, ConfigBlock)


def _did_you_mean(location: list[str], block: type[ConfigBlock]) -> str:
    annotation: Any = block
    for part in location[:-1]:
        annotation = _below(annotation, part)
    names = list(annotation.model_fields)
    close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"; known here: {', '.join(names)}"
