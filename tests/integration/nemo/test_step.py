"""bench/nemo_step.py runs, on a toy's sizes."""

from __future__ import annotations

import pytest

from bench import nemo_step

pytestmark = pytest.mark.slow

TOY = "--prompts 1 --rollouts 4 --prompt 6 --context 12 --response 4 --k 4 --ranks 2 --repeats 1 --width 128 --layers 1"


@pytest.mark.parametrize("targets", ["workers", "driver"])
def test_every_phase_is_measured(targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = nemo_step.main([*TOY.split(), "--targets", targets])
    assert {name for name, value in found.items() if value == 0} == (
        {"student's top k"} if targets == "workers" else set()
    )
    out = capsys.readouterr().out
    assert all(f"| {phase} | " in out for phase in nemo_step.PHASES) and "4 rows of 6 + up to 4 tokens" in out
