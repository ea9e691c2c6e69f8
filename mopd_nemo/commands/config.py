"""`mopd config`: what a config says when all its files are read, and a schema of configs for editors."""

from __future__ import annotations

import json
from typing import Any

import typer

from mopd_nemo.commands import ConfigFile, Overrides
from mopd_nemo.config import Config
from mopd_nemo.config.load import dump_config, load_config
from mopd_nemo.terminal import visible

app = typer.Typer(help="Configs: every setting of one, and a schema for editors.", no_args_is_help=True)
_INTERPOLATION = {"type": "string", "pattern": r"^\$\{[^}]+\}$"}


@app.command("show")
def show(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Print every setting of a config, after its `defaults:` files and the command line, as a run would record it."""
    print(visible(dump_config(load_config(config, overrides or []))), end="")


@app.command("schema")
def schema() -> None:
    """Print a JSON schema of configs: editors then complete keys, show their meaning, and mark mistakes.

    mopd config schema > mopd.schema.json
    """
    print(json.dumps(config_schema(), indent=2, ensure_ascii=False))


def config_schema() -> dict[str, Any]:
    """The JSON schema of a config file, which may be one of several that `defaults:` joins.

    Rules between settings are not in it: those are what `mopd train --dry-run` is for.
    """
    found = Config.model_json_schema()
    for block in (found, *found["$defs"].values()):
        for key, value in block.get("properties", {}).items():
            block["properties"][key] = _or_interpolation(value)
        block.pop("required", None)
    files = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    meaning = "Config files that are read first, relative to this one."
    found["properties"] = {"defaults": {"description": meaning, **files}} | found["properties"]
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | found | {"title": "mopd-nemo config"}


def _or_interpolation(value: dict[str, Any]) -> dict[str, Any]:
    """The schema of a setting that may also be `${another.setting}`. Blocks and text stay as they are."""
    if "$ref" in value or (value.get("type") == "string" and "enum" not in value):
        return value
    about = {name: value[name] for name in ("description", "default") if name in value}
    kind = {name: part for name, part in value.items() if name not in ("description", "default", "title")}
    return about | {"anyOf": [*kind.get("anyOf", [kind]), _INTERPOLATION]}
