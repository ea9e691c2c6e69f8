"""Engines run the models. `base` is the seam: the rest of the package does not know which engine it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not at run time: modules of `nemo` are also imported where those that these need are missing
    from typing import Any

    from mopd_nemo.config import Config
    from mopd_nemo.engines.base import Engine
    from mopd_nemo.engines.memory import Estimate


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


def estimate_memory(config: Config, device: str, device_gb: float) -> Estimate | None:
    """The peak memory of a config, before anything is loaded: for `mopd estimate`, dry runs and preflight.

    Args:
        device: `cuda` or `cpu`; `engine: nemo` is on GPUs.
        device_gb: memory of the device, of which vLLM takes a share.

    Returns:
        None: the sizes of a model are unknown.
    """
    from mopd_nemo.engines.architecture import architecture_of

    paths = [config.model.path, *(t.path for t in config.every_teacher.values() if t.path)]
    known = [sizes for sizes in map(architecture_of, paths) if sizes is not None]
    if len(known) < len(paths):
        return None
    student, *teachers = known
    if config.engine == "nemo":
        from mopd_nemo.engines.nemo.memory import estimate as of_cluster

        return of_cluster(config, student, teachers[0] if teachers else None, device_gb)
    from mopd_nemo.engines.local.memory import estimate as of_one_device

    return of_one_device(config, student, teachers, device, device_gb)


def check_adapters(config: Config) -> None:
    """The model has the layers that `lora.targets` names; its weights are not read.

    Raises:
        UserError: it has not.
    """
    if config.lora.rank and config.engine == "local":
        from mopd_nemo.engines.local.lora import check_targets

        check_targets(config)
