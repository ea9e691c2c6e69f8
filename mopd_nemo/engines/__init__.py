"""Engines run the models. `base` is the seam: the rest of the package does not know which engine it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not at run time: modules of `nemo` are also imported where those that these need are missing
    from typing import Any

    from mopd_nemo.config import Config
    from mopd_nemo.engines.base import Engine


def make_engine(config: Config) -> Engine[Any]:
    """Load models for the configured engine.

    Raises:
        UserError: a model, device or budget does not fit; the message names the key.
    """
    if config.engine == "nemo":
        from mopd_nemo.engines.nemo.engine import NemoEngine

        return NemoEngine(config)
    from mopd_nemo.engines.local.engine import LocalEngine

    return LocalEngine(config)
