"""`bench/settings.py` measures what it says, at a toy size."""

import sys

import pytest

from bench.settings import PHASES, arguments, measure


def test_adapters_take_less_memory_than_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--dtype=float32", "--prompts=1", "--rollouts=2", "--tokens=4", "--context=80", "--steps=1"]
    monkeypatch.setattr(sys, "argv", ["lora.py", "embedded:arithmetic", *sizes])
    full, low = (measure(arguments(), settings) for settings in ([], ["lora.rank=4"]))
    assert low["bytes"] < 0.6 * full["bytes"]
    assert all(side[phase] >= 0 for side in (full, low) for phase in ("step", *PHASES))
