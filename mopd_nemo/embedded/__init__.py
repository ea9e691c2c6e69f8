"""The model that ships with the package; `recipes/embedded_model` made it."""

from __future__ import annotations

from pathlib import Path

from mopd_nemo.config import UserError

_PREFIX = "embedded:"


def resolve_model_path(path: str) -> str:
    """The directory of `embedded:NAME`. Any other path stays as it is."""
    if not path.startswith(_PREFIX):
        return path
    directory = Path(__file__).parent / path.removeprefix(_PREFIX)
    if not (directory / "config.json").is_file():
        names = sorted(file.parent.name for file in Path(__file__).parent.glob("*/config.json"))
        raise UserError(
            f"model {path!r} is not embedded; embedded models: {', '.join(_PREFIX + name for name in names)}"
        )
    return str(directory)
