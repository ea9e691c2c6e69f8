from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mopd_nemo.config import UserError
from mopd_nemo.engines.local.engine import LocalEngine
from tests.conftest import make_random_model

Make = Callable[..., LocalEngine]


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def teacher_of(engine: LocalEngine) -> torch.nn.Module:
    assert engine.teacher.model is not None
    return engine.teacher.model.module


def drift(engine: LocalEngine, amount: float) -> None:
    with torch.no_grad():
        for parameter in engine.student.module.parameters():
            parameter.add_(amount)


def test_ema_equals_its_closed_form_and_survives_save_and_load(make: Make, tmp_path: Path) -> None:
    rate, amount, steps = 0.05, 1e-6, 50
    engine = make("teacher.kind=ema", f"teacher.ema_rate={rate}", "model.dtype=bfloat16")
    start = flat(teacher_of(engine)).double()
    for step in range(steps):
        drift(engine, amount)
        engine.update_teacher()
        if step == steps // 2:
            engine.save(tmp_path)
            engine = make("teacher.kind=ema", f"teacher.ema_rate={rate}", "model.dtype=bfloat16")
            engine.load(tmp_path)
    # student after n steps: s0 + n·a; average: s0 + a·(n - (1 - rate)/rate·(1 - (1 - rate)^n))
    moved = amount * (steps - (1 - rate) / rate * (1 - (1 - rate) ** steps))
    got = (flat(teacher_of(engine)).double() - start).mean().item()
    assert got == pytest.approx(moved, rel=2e-2)
    assert got > 10 * amount, "an average kept in bfloat16 would hardly have moved"


def test_live_is_the_student_and_frozen_stays(make: Make) -> None:
    live, frozen = make("teacher.kind=live"), make("teacher.kind=frozen")
    before = flat(teacher_of(frozen)).clone()
    for engine in (live, frozen):
        drift(engine, 0.1)
        engine.update_teacher()
    assert live.teacher.model is live.student
    assert torch.equal(flat(teacher_of(frozen)), before)


def test_frozen_teacher_is_the_initial_model_after_a_resume_too(make: Make, tmp_path: Path) -> None:
    engine = make("teacher.kind=frozen")
    initial = flat(engine.student.module).clone()
    drift(engine, 0.1)
    engine.save(tmp_path)
    resumed = make("teacher.kind=frozen")
    resumed.load(tmp_path)
    assert torch.equal(flat(teacher_of(resumed)), initial)
    assert torch.equal(flat(resumed.student.module), flat(engine.student.module))


def test_external_teacher_is_another_model(make: Make, tmp_path: Path) -> None:
    other = make_random_model(tmp_path, seed=7)
    engine = make("teacher.kind=external", f"teacher.path={other}")
    assert not torch.equal(flat(teacher_of(engine)), flat(engine.student.module))


def test_teacher_prompt_budget_must_fit_the_model(make: Make) -> None:
    with pytest.raises(UserError, match=r"peers.max_context_tokens=5000.*4096 positions"):
        make("peers.max_context_tokens=5000")
