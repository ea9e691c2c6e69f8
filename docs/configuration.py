"""`docs/configuration.md` from the docstrings of the config tree: `make docs`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mopd_nemo.config import Config

_HEAD = """# Configuration

Every setting, its default and its meaning. Generated from `mopd_nemo/config` by `make docs`.

A config is a YAML file. `defaults: other.yaml` (or a list of files, relative to this one) is read first and overridden.
`${key}` repeats another value of the file. On the command line, `section.key=value` overrides the file. An unknown key
is an error. `config.yaml` in a run directory holds every setting of that run.
"""


def render() -> str:
    """The whole page as Markdown."""
    sections: list[str] = []
    _section("", Config, sections)
    return _HEAD + "\n" + "\n".join(sections)


def _section(prefix: str, model: type[BaseModel], sections: list[str]) -> None:
    own: list[str] = []
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            nested.append((f"{prefix}{name}", annotation))
            continue
        if get_origin(annotation) is dict and issubclass(get_args(annotation)[1], BaseModel):
            nested.append((f"{prefix}{name}.NAME", get_args(annotation)[1]))
        description = " ".join((field.description or "").split()).replace("|", "\\|")
        required = field.is_required()
        default = "required" if required else _default(field.get_default(call_default_factory=True))
        own.append(f"| `{prefix}{name}` | {_values(annotation)} | `{default}` | {description} |")
    heading = prefix.removesuffix(".") or "Top level"
    lines = [f"## {heading}", "", " ".join(inspect.cleandoc(model.__doc__ or "").split()), ""]
    lines += ["| key | values | default | meaning |", "|---|---|---|---|", *own, ""]
    sections.append("\n".join(lines))
    for path, section in nested:
        _section(f"{path}.", section, sections)


def _values(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (UnionType, Union):
        return " or ".join(_values(part) for part in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _values(get_args(annotation)[0])
    if annotation is type(None):
        return "`null`"
    names = {int: "integer", float: "number", str: "text", bool: "true, false"}
    return names.get(annotation, "mapping" if get_origin(annotation) is dict else "list")


def _default(value: Any) -> str:
    assert value is not PydanticUndefined
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(render(), encoding="utf-8")
