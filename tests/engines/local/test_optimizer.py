"""The optimiser with bfloat16 weights and 8-bit moments."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mopd_nemo.config import OptimizerConfig, UserError
from mopd_nemo.engines.local import optimizer as module
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.optimizer import (
    MOMENTS,
    SmallAdamW,
    _read,
    _write,
    levels,
    make_optimizer,
    nearest_codes,
    stochastically_rounded,
)
from mopd_nemo.losses.objectives import Divergence
from mopd_nemo.run.checkpoints import checkpoints
from mopd_nemo.run.directory import RunDirectory
from tests.conftest import QUICKSTART, Mopd
from tests.engines.local.test_learner import TEACHER_PROMPTS, learn, make_batch, make_rows, score
from tests.test_trainer import SMALL, finish_through_kills, new_run, start, without_times

Make = Callable[..., LocalEngine]
BF16 = ("model.dtype=bfloat16", "optimizer.weights=bfloat16")
INT8 = "optimizer.moments=int8"
LARGE = "model.path=embedded:arithmetic"
"""Whose matrices are large enough for codes."""
WAYS = pytest.mark.parametrize("way", [BF16, (*BF16, INT8), (INT8,)], ids=" ".join)
SHAPE = (64, 128)
TORCHAO = (1664271903, 382293844)


def draws(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def small(start: Tensor, name: str = "w", **settings: object) -> tuple[nn.Parameter, SmallAdamW]:
    parameter = nn.Parameter(start.clone())
    parameter.grad_dtype = torch.float32
    groups = [{"params": [(name, parameter)], "weight_decay": 0.01}]
    return parameter, SmallAdamW(groups, OptimizerConfig(**settings), "seed")  # type: ignore[arg-type]


def trained(engine: LocalEngine) -> dict[str, Tensor]:
    return {name: weights.detach().clone() for name, weights in engine.student.trained().items()}


# ------------------------------------------------------------------------------------------------------- rounding


def test_a_rounded_number_is_a_neighbour_and_its_mean_is_the_number() -> None:
    exact = torch.tensor([1.0, -1.0, 0.0, 1.0 + 2**-10, -0.3, 3.14159e-5, 2.0 - 2**-12, -1e30])
    rounded = stochastically_rounded(exact.repeat(100_000, 1), draws("mean"))
    assert rounded.dtype == torch.bfloat16
    step = exact.abs() * 2**-7
    assert ((rounded.float() - exact).abs() <= step).all()
    assert torch.equal(rounded[:, :3], exact[:3].bfloat16().expand(100_000, -1)), "what fits stays as it is"
    error = (rounded.double().mean(0) - exact.double()).abs()
    assert (error <= 0.01 * step).all()


def test_updates_below_half_a_step_are_made_in_the_mean_and_lost_by_the_nearest() -> None:
    """Steps of bfloat16 are 2^-8 below 1, and an update is a fiftieth of that."""
    rate, updates, start = 2**-8 / 50, 40, 0.75
    weights, optimizer = small(torch.full(SHAPE, start).bfloat16(), weights="bfloat16", learning_rate=rate)
    whole = nn.Parameter(torch.full(SHAPE, start))
    reference = torch.optim.AdamW([whole], lr=rate, weight_decay=0.01)
    nearest = torch.full(SHAPE, start).bfloat16()
    for _ in range(updates):
        before = whole.detach().clone()
        for parameter, own in ((weights, optimizer), (whole, reference)):
            parameter.grad = torch.ones(SHAPE)
            own.step()
        nearest = (nearest.float() + (whole.detach() - before)).bfloat16()
    moved = start - whole.detach().mean().item()
    assert moved == pytest.approx(updates * rate, rel=0.1)
    assert start - weights.detach().double().mean().item() == pytest.approx(moved, rel=0.05)
    assert torch.equal(nearest, torch.full(SHAPE, start).bfloat16()), "nothing has moved"


def test_draws_are_named_by_update_and_parameter() -> None:
    def moved(updates: int, name: str = "w") -> Tensor:
        torch.manual_seed(updates)  # which nothing is drawn from
        start = torch.full(SHAPE, 0.75).bfloat16()
        weights, optimizer = small(start, name, weights="bfloat16", learning_rate=1e-4)
        for _ in range(updates):
            weights.grad = torch.ones(SHAPE)
            optimizer.step()
        return weights.detach() != start

    first, second = moved(1), moved(2)
    assert first.any() and torch.equal(first, moved(1))
    assert (second & ~first).any(), "with the draws of the first, the second would move none of these"
    assert not torch.equal(first, moved(1, "other"))


# -------------------------------------------------------------------------------------------------------- moments


def test_in_float32_it_is_adamw() -> None:
    start = torch.randn(SHAPE, generator=draws("start"))
    weights, optimizer = small(start, learning_rate=1e-2)
    whole = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([whole], lr=1e-2, weight_decay=0.01)
    for update in range(5):
        for parameter, own in ((weights, optimizer), (whole, reference)):
            parameter.grad = torch.randn(SHAPE, generator=draws(str(update)))
            own.step()
    torch.testing.assert_close(weights, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_8_bit_moments_are_near_and_take_two_bytes(size: float) -> None:
    start = torch.zeros(SHAPE)
    moved = {}
    for moments in ("float32", "int8"):
        weights, optimizer = small(start, moments=moments, learning_rate=1e-2)
        for update in range(10):
            weights.grad = size * torch.randn(SHAPE, generator=draws(str(update)))
            optimizer.step()
        moved[moments] = weights.detach() - start
    error = (moved["int8"] - moved["float32"]).norm() / moved["float32"].norm()
    assert 0 < error < 0.03
    held = [value for value in optimizer.state[weights].values() if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in held) == weights.numel() * (2 + 8 / 256)


@pytest.mark.parametrize("shape", [(63, 64), (4097,)])
def test_a_small_or_odd_parameter_keeps_float32_moments(shape: tuple[int, ...]) -> None:
    weights, optimizer = small(torch.zeros(shape), moments="int8")
    weights.grad = torch.ones(shape)
    optimizer.step()
    assert {optimizer.state[weights][name].dtype for name in MOMENTS} == {torch.float32}


def written(name: str, values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    whole = slice(0, values.numel())
    state = {name: torch.zeros(values.numel(), dtype=torch.uint8), f"{name}_scale": torch.zeros(values.numel() // 256)}
    _write(state, name, whole, values)
    return state, _read(state, name, whole)


def test_every_level_is_kept_and_the_nearest_is_taken() -> None:
    for name in MOMENTS:
        found = levels(name, torch.device("cpu"))
        assert len(found.unique()) == 256 and found[-1] == 1 and (found.diff() > 0).all()
        state, read = written(name, 3 * found)
        low = name == "exp_avg_sq"  # squares are never 0
        assert torch.equal(read[low:], 3 * found[low:]) and state[name].tolist()[low:] == list(range(low, 256))
        values = torch.linspace(found[1].item(), 1, 256)
        nearest = (values[:, None] - found).abs().amin(1)
        torch.testing.assert_close((written(name, values)[1] - values).abs(), nearest)


@pytest.mark.parametrize("name", MOMENTS)
def test_codes_are_those_of_a_search(name: str) -> None:
    """At every middle between two levels, its two neighbours, and numbers of all sizes."""
    found = levels(name, torch.device("cpu"))
    middles = (found[1:] + found[:-1]) / 2
    spread = torch.randn(100_000, generator=draws(name)).clamp(-1, 1) * 10 ** (-9 * torch.rand(100_000))
    values = torch.cat([found, middles, *(middles.nextafter(torch.tensor(end)) for end in (-2.0, 2.0)), spread])
    values = values if name == "exp_avg" else values.abs()
    assert torch.equal(nearest_codes(name, values).long(), torch.bucketize(values, middles, right=True))


def test_codes_are_those_of_torchao() -> None:
    """Codes that torchao 0.18.0 (`OptimState8bit`) gave for the same numbers, where squares are not 0."""
    values = torch.cat([torch.linspace(-1, 1, 512) ** 3, torch.linspace(-2e-3, 1e-3, 512)])
    for name, expected in (("exp_avg", TORCHAO[0]), ("exp_avg_sq", TORCHAO[1])):
        state, _ = written(name, values if name == "exp_avg" else values.abs() + 1e-3)
        assert zlib.crc32(bytes(state[name].tolist())) == expected


def test_a_square_that_rounds_to_zero_does_not_throw_its_weight_away() -> None:
    """A gradient of 1e-4 beside one of 1 in a block: its mean keeps a code, and its square is below the least level."""
    weights, optimizer = small(torch.zeros(SHAPE), moments="int8", learning_rate=1e-3)
    gradient = torch.full(SHAPE, 1e-4)
    gradient[:, 0] = 1.0
    weights.grad = gradient
    optimizer.step()
    before = weights.detach().clone()
    weights.grad = torch.zeros(SHAPE)
    optimizer.step()
    assert optimizer.state[weights]["exp_avg"].view(-1)[1] != optimizer.state[weights]["exp_avg"].view(-1)[0]
    assert (weights - before).abs().max() <= 1e-3


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (2**20, 512):
        monkeypatch.setitem(module.SLICE, "cpu", size)
        weights, optimizer = small(torch.ones(SHAPE), moments="int8", learning_rate=1e-2)
        for update in range(3):
            weights.grad = torch.randn(SHAPE, generator=draws(str(update)))
            optimizer.step()
        results.append(weights.detach())
    assert torch.equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_codes_are_the_same_and_a_resume_continues_bit_for_bit() -> None:
    def steps(weights: nn.Parameter, optimizer: SmallAdamW, *updates: int) -> None:
        for update in updates:
            weights.grad = torch.randn(SHAPE, generator=draws(str(update))).cuda()
            optimizer.step()

    settings = {"weights": "bfloat16", "moments": "int8", "learning_rate": 1e-2}
    whole, killed, resumed = (small(torch.ones(SHAPE).bfloat16().cuda(), **settings) for _ in range(3))
    steps(*whole, 0, 1, 2, 3)
    steps(*killed, 0, 1)
    resumed[0].data.copy_(killed[0])
    resumed[1].load_state_dict(killed[1].state_dict())
    steps(*resumed, 2, 3)
    assert torch.equal(whole[0], resumed[0])
    values = torch.randn(10_000, generator=draws("codes")).clamp(-1, 1)
    for name in MOMENTS:
        assert torch.equal(nearest_codes(name, values.cuda()).cpu(), nearest_codes(name, values))


# ----------------------------------------------------------------------------------------------- the whole engine


@WAYS
def test_an_update_lowers_the_loss(make: Make, way: tuple[str, ...]) -> None:
    engine = make(*way, LARGE, "teacher.kind=frozen")
    rows = make_rows(engine, TEACHER_PROMPTS)
    targets = score(engine, rows)
    losses = [engine.update(make_batch(rows, Divergence()), targets, learning_rate=3e-3)["loss"] for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    assert {weights.dtype for weights in trained(engine).values()} == {
        torch.bfloat16 if way[0] == BF16[0] else torch.float32
    }


def gradients(engine: LocalEngine, batches: list[list[int]]) -> dict[str, Tensor]:
    """Float32 sums over micro-batches that are given, by the engine."""
    learner = engine._learner
    rows = make_rows(engine, TEACHER_PROMPTS)
    learner._micro_batches = lambda *_: batches  # type: ignore[method-assign]
    learner._apply = lambda _: {}  # type: ignore[method-assign]
    engine.update(make_batch(rows, Divergence()), score(engine, rows), 0.0)
    return {name: weights.grad.clone() for name, weights in engine.student.trained().items()}  # type: ignore[union-attr]


def test_micro_batches_are_added_up_in_float32(make: Make) -> None:
    parts = [[i] for i in range(8)]
    alone = [gradients(make(*BF16, "teacher.kind=frozen"), [part]) for part in parts]
    for name, found in gradients(make(*BF16, "teacher.kind=frozen"), parts).items():
        total = torch.stack([part[name] for part in alone]).double().sum(0)
        assert found.dtype == torch.float32
        assert (found - total).norm() <= 1e-6 * total.norm(), name
        narrow = torch.zeros_like(found, dtype=torch.bfloat16)
        for part in alone:
            narrow += part[name].bfloat16()
        assert (narrow.float() - total).norm() > 1e-4 * total.norm(), "bfloat16 would show"


@WAYS
def test_a_resumed_engine_continues_bit_for_bit(make: Make, way: tuple[str, ...], tmp_path: Path) -> None:
    def steps(engine: LocalEngine, count: int) -> None:
        for _ in range(count):
            learn(engine, rows, 1e-3)
            engine.update_teacher()

    whole, killed, resumed = (make(*way, LARGE) for _ in range(3))
    rows = make_rows(whole, TEACHER_PROMPTS)
    steps(whole, 6)
    steps(killed, 3)
    killed.save(tmp_path)
    resumed.load(tmp_path)
    steps(resumed, 3)
    codes = any(state["exp_avg"].dtype == torch.uint8 for state in resumed._learner.optimizer.state.values())
    assert codes == (INT8 in way)
    for name, weights in trained(whole).items():
        assert torch.equal(weights, trained(resumed)[name]), name
    averages = [engine.teacher.model.named_parameters() for engine in (whole, resumed)]  # type: ignore[union-attr]
    assert all(torch.equal(average, averages[1][name]) for name, average in averages[0].items())
    kind = torch.bfloat16 if way[0] == BF16[0] else torch.float32
    assert {weights.dtype for weights in load_file(tmp_path / "model.safetensors").values()} == {kind}


def test_the_average_of_bfloat16_weights_is_float32(make: Make, tmp_path: Path) -> None:
    """A change of a thousandth of a step is in it after a move, and after a resume."""
    engine = make(*BF16, "teacher.kind=ema", "teacher.ema_rate=0.001")
    average = engine.teacher.model.named_parameters()["model.norm.weight"]  # type: ignore[union-attr]
    current = engine.student.trained()["model.norm.weight"]
    before = average.clone()
    with torch.no_grad():
        current.add_(torch.finfo(torch.bfloat16).eps * current.abs())
    engine.update_teacher()
    expected = before + 0.001 * (current.float() - before)
    torch.testing.assert_close(average, expected, rtol=1e-6, atol=0)
    assert not torch.equal(average, before)
    engine.save(tmp_path)
    again = make(*BF16, "teacher.kind=ema", "teacher.ema_rate=0.001")
    again.load(tmp_path)
    assert torch.equal(again.teacher.model.named_parameters()["model.norm.weight"], average)  # type: ignore[union-attr]


def test_a_checkpoint_of_other_types_is_refused(make: Make, tmp_path: Path) -> None:
    plain, compact = ("model.dtype=bfloat16",), (*BF16, INT8)
    for saved, wanted, key in ((plain, BF16, "weights"), (BF16, compact, "moments"), (compact, plain, "weights")):
        engine = make(*saved)
        learn(engine, make_rows(engine, TEACHER_PROMPTS), 1e-3)
        directory = tmp_path / key / str(len(saved))
        directory.mkdir(parents=True)
        engine.save(directory)
        with pytest.raises(UserError, match=rf"optimizer\.{key}="):
            make(*wanted).load(directory)


def test_an_old_torch_is_refused_before_a_model_is_loaded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Tensor", object)
    with pytest.raises(UserError, match=r"needs torch 2\.10"):
        make(*BF16, "model.path=no/such/model")


def test_the_plain_optimiser_is_torchs_own_in_one_kernel_on_a_gpu(make: Make) -> None:
    engine = make()
    optimizer = make_optimizer(engine.student, engine._config)
    assert type(optimizer) is torch.optim.AdamW
    assert bool(optimizer.defaults["fused"]) == (engine.student.device.type == "cuda")


# ---------------------------------------------------------------------------------------------------- whole runs


def test_a_killed_run_continues_bit_for_bit_and_is_exported_in_bfloat16(mopd: Mopd, tmp_path: Path) -> None:
    """With rollouts in flight at every moment, drawn by a second copy of the weights."""
    settings = [*BF16, INT8, "rollout.lag=1"]
    whole, killed = new_run(tmp_path / "whole", *settings), RunDirectory(tmp_path / "killed")
    process = start("--config", str(QUICKSTART), f"run_dir={killed.path}", *SMALL, *settings)
    finish_through_kills(process, killed, {3: "", 5: ""})
    assert without_times(whole.rows(whole.metrics_file)) == without_times(killed.rows(killed.metrics_file))
    for part, kind in (("model.safetensors", torch.bfloat16), ("teacher/model.safetensors", torch.float32)):
        first, second = (load_file(checkpoints(run.checkpoints)[-1] / part) for run in (whole, killed))
        assert all(torch.equal(first[key], second[key]) and first[key].dtype == kind for key in first)
    code, printed = mopd("export", str(whole.path), "-o", str(tmp_path / "out"), "--checkpoint", "newest")
    assert code == 0, printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_checkpoint_takes_what_the_estimate_says(make: Make, tmp_path: Path) -> None:
    engine = make(*BF16, INT8, LARGE)
    learn(engine, make_rows(engine, TEACHER_PROMPTS), 1e-3)
    engine.save(tmp_path)
    saved = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.suffix in (".pt", ".safetensors"))
    assert engine.checkpoint_bytes() == pytest.approx(saved, rel=0.1)
