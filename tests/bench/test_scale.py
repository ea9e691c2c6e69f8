"""The table over the configs."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.scale import PHASES, SAVINGS, Setting, assume, context, contexts, read, readings, seconds
from bench.scale_splits import best, rows, splits
from bench.step import ratio
from bench.step_curves import exponent, line
from mopd_nemo.peers.select import Candidates, select_peers

CONFIGS = Path(__file__).parents[2] / "configs"
LEAVES = sorted(file for folder in ("paper", "beyond", "nemo") for file in (CONFIGS / folder).glob("*-qwen3-*.yaml"))
ALL = frozenset(SAVINGS)


def setting(name: str) -> Setting:
    return read(next(file for file in LEAVES if file.stem == name), assume({}).tasks)


@pytest.mark.parametrize("file", LEAVES, ids=lambda file: file.stem)
def test_every_config_has_a_cost_and_no_saving_costs(file: Path) -> None:
    assumed = assume({})
    found = read(file, assumed.tasks)
    whole = seconds(found, assumed)
    assert [*whole] == [*PHASES]
    for saving in SAVINGS:
        without = seconds(found, assumed, ALL - {saving})
        assert sum(without.values()) >= sum(whole.values())


def test_savings_by_hand() -> None:
    mopd, assumed = setting("mopd-qwen3-8b-chemistry-1n8g-tp2"), assume({"signal.mopd": 0.5})
    assert context(mopd) == (300 + 3 * 800, 2)
    whole = readings(mopd, assumed, ALL)
    assert (whole["student"][0].count, whole["student"][0].tokens, whole["student"][0].head_rows) == (128, 1100, 800)
    shared, rest = whole["teacher"]
    assert (shared.count, shared.tokens, shared.head_rows) == (32 * 2, 2700, 0)
    assert (rest.count, rest.tokens, rest.head_rows, rest.cached) == (128, 800, 800, 2700)
    naive = readings(mopd, assumed, frozenset())
    assert [(r.count, r.tokens, r.head_rows) for r in naive["teacher"]] == [(256, 3500, 3500)]
    assert naive["student"][0].head_rows == 1100


def test_contexts_of_the_other_methods() -> None:
    assert context(setting("sdpo-qwen3-8b-chemistry-1n8g-tp2")) == (300 + 800, 2)
    assert context(setting("opd-qwen3-14b-to-4b-livecodebench-2n8g-tp2")) == (800, 1)
    assert context(setting("mopd-qwen3-8b-chemistry-1n8g-tp2-8s-4h")) == (300 + 800 + 7 * 64, 8)
    assert context(setting("mopd-qwen3-4b-maths-1n8g-tp2"))[0] == 10240  # the whole context's budget


@pytest.mark.parametrize("order", ["canonical", "shortest"])
@pytest.mark.parametrize(("successes", "failures"), [(2, 1), (1, 0), (2, 2)])
def test_number_of_contexts_is_that_of_the_selection(order: str, successes: int, failures: int) -> None:
    found = setting("mopd-qwen3-8b-chemistry-1n8g-tp2")
    peers = found.config.peers.model_copy(update={"order": order, "successes": successes, "failures": failures})
    changed = replace(found, config=found.config.model_copy(update={"peers": peers}))
    pool = Candidates(0, tuple(map(str, range(8))), (1,) * 8, (0, 1, 2, 3), (4, 5, 6, 7), ("",) * 8)
    selected = set(select_peers(pool, peers, "seed"))
    assert context(changed)[1] == len(selected)


def test_methods_pay_only_for_what_they_do() -> None:
    assumed = assume({})
    grpo = seconds(setting("grpo-qwen3-8b-chemistry-1n8g-tp2"), assumed)
    assert grpo["teacher"] == grpo["swap"] == grpo["targets"] == grpo["old"] == 0
    gkd = seconds(setting("gkd-qwen3-14b-to-4b-tooluse-2n8g-tp2"), assumed)
    assert gkd["decode"] == gkd["teacher"] == 0 < gkd["update"]
    apart = setting("mopd-qwen3-32b-to-8b-livecodebench-4n8g-tp2")
    together = replace(apart, config=apart.config.model_copy(update={"nemo": apart.config.nemo.model_copy(
        update={"teacher_gpus": 0})}))  # fmt: skip
    ratio_of_gpus = seconds(apart, assumed)["teacher"] / seconds(together, assumed)["teacher"]
    assert ratio_of_gpus == pytest.approx(2)  # 16 GPUs against all 32


def test_a_contrast_reads_two_prompts() -> None:
    """Successes and failures each in a prompt of their own: 2 and 1 of 800 tokens after a prompt of 300."""
    plain, assumed = setting("mopd-qwen3-8b-chemistry-1n8g-tp2"), assume({"signal.mopd": 1.0})
    divergence = plain.config.divergence.model_copy(update={"contrast": 0.5})
    peers = plain.config.peers.model_copy(update={"successes": 2, "failures": 1})
    contrast = replace(plain, config=plain.config.model_copy(update={"divergence": divergence, "peers": peers}))
    assert contexts(contrast) == [(300 + 2 * 800, 2), (300 + 800, 2)]
    teacher = readings(contrast, assumed, frozenset({"rows"}))["teacher"]
    assert [(r.count, r.tokens, r.head_rows) for r in teacher] == [(256, 2700, 800), (256, 1900, 800)]
    one, two = seconds(plain, assumed), seconds(contrast, assumed)
    assert two["teacher"] > 1.2 * one["teacher"] and two["targets"] == pytest.approx(1.5 * one["targets"])
    assert two["update"] == one["update"]


def test_a_lag_hides_the_shorter_side_of_a_split() -> None:
    found, assumed = setting("mopd-qwen3-8b-chemistry-1n8g-tp2"), assume({})
    turns, *apart = splits(found, assumed)
    assert turns.step(0) == pytest.approx(sum(seconds(found, assumed).values()))
    with pytest.raises(ValueError, match="only generate"):
        turns.step(1)
    assert [(s.generating, s.learning) for s in apart] == [(2, 6), (4, 4)]  # two GPUs a copy; 2 that learn are too few
    for split in apart:
        assert split.step(0) - split.step(1) == pytest.approx(min(split.drawing, split.rest))
    chosen = best(found, assumed, 1)
    assert chosen is not None and chosen.step(1) == min(split.step(1) for split in apart)
    drawing, rest = [split.drawing for split in apart], [split.rest for split in apart]
    assert drawing == sorted(drawing, reverse=True) and rest == sorted(rest)


def test_a_split_without_room_for_the_student_is_left_out() -> None:
    found = setting("mopd-qwen3-8b-chemistry-1n8g-tp2")
    small = assume({"memory": 40e9})
    assert best(found, small, 1) is None
    (row,) = rows([found], small)
    assert row[2:] == ["-"] * 5


def test_nodes_are_split_whole() -> None:
    found = setting("mopd-qwen3-32b-to-8b-livecodebench-4n8g-tp2")  # 16 of its GPUs are the teacher's
    assert [(s.generating, s.learning) for s in splits(found, assume({}))] == [(0, 16), (8, 8)]


def test_assumptions_change_what_they_name() -> None:
    found = setting("mopd-qwen3-8b-chemistry-1n8g-tp2")
    plain, fast = seconds(found, assume({})), seconds(found, assume({"mfu_update": 0.8}))
    assert fast.pop("update") == pytest.approx(plain.pop("update") / 2)
    assert fast == plain
    with pytest.raises(SystemExit, match="unknown assumption mfu_updates=1"):
        assume({"mfu_updates": 1.0})


def test_ratios_are_of_pairs_and_fits_are_exact_on_a_line() -> None:
    a, b = [{"seconds": 2.0}, {"seconds": 30.0}, {"seconds": 8.0}], [{"seconds": x} for x in (1.0, 10.0, 2.0)]
    assert ratio(a, b)[0] == 3.0
    points = {n: {"step": 0.5 + 0.25 * n, "square": 3.0 * n**2} for n in (4, 8, 16)}
    assert line(points, "step") == pytest.approx((0.5, 0.25, 1.0))
    assert exponent(points, "square") == pytest.approx(2.0)
