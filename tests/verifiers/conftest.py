"""Sandboxes of every layer, with limits small enough to break in a test."""

import functools

import pytest

from mopd_nemo.config.verifiers import CodeConfig
from mopd_nemo.verifiers.sandbox.layers import LAYERS, Launch, LayerName, try_layer

TIGHT = CodeConfig(seconds_per_test=1.0, memory_mb=256, output_mb=1, scratch_mb=8, processes=12)


@functools.cache
def launch_or_reason(layer: LayerName) -> Launch | str:
    return try_layer(layer, TIGHT)


def launch_of(layer: LayerName) -> Launch:
    """How to start a layer; skips, with the reason, where it does not work."""
    launch = launch_or_reason(layer)
    if isinstance(launch, str):
        pytest.skip(f"no {layer} here: {launch}")
    return launch


@pytest.fixture(scope="module", params=LAYERS)
def layer(request: pytest.FixtureRequest) -> LayerName:
    """Each layer in turn."""
    launch_of(request.param)
    return request.param


@pytest.fixture(scope="session")
def best_layer() -> LayerName:
    """The best layer of this machine; limits alone when nothing isolates."""
    return next(layer for layer in LAYERS if isinstance(launch_or_reason(layer), Launch))
