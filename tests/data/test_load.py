import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.data.arithmetic import make_problems
from mopd_nemo.data.load import (
    changes,
    fingerprints,
    judgeable,
    load_problems,
    problems_of_step,
    read_problems,
    with_teachers,
)
from mopd_nemo.verifiers.pool import VerifierPool
from tests.conftest import QUICKSTART


def test_suffix_ends_the_user_turn_of_both_splits(tmp_path: Path) -> None:
    rows = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"id": "a", "messages": rows, "answer": "1", "task": "math"}) + "\n")
    config = load_config(QUICKSTART, [f"data.train={file}", "data.num_eval=1", "data.prompt_suffix=' Summarise.'"])
    (train,), (held_out,) = load_problems(config, "train"), load_problems(config, "eval")
    assert [message["content"] for message in train.messages] == ["s", "u Summarise."]
    assert held_out.messages[-1]["content"].endswith("{digit}. Summarise.")


def test_a_suffix_of_training_alone_comes_last_and_nowhere_else() -> None:
    settings = [
        "data.prompt_suffix=' Both.'",
        "data.train_prompt_suffix=' Train.'",
        "data.num_train=1",
        "data.num_eval=1",
    ]
    config = load_config(QUICKSTART, settings)
    (train,), (held_out,) = load_problems(config, "train"), load_problems(config, "eval")
    assert train.messages[-1]["content"].endswith("Both. Train.")
    assert held_out.messages[-1]["content"].endswith("Both.")


def test_tests_are_counted_only_where_all_are_run(tmp_path: Path) -> None:
    file, counted = tmp_path / "eval.jsonl", ["eval.paper_metrics=true", f"data.eval={tmp_path}/eval.jsonl"]
    answer = {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}
    file.write_text(json.dumps({"id": "a", "prompt": "?", "answer": answer, "task": "code"}) + "\n")
    with pytest.raises(
        UserError, match=r"data.eval=.*eval.jsonl would be stopped .*: set verifier.code.all_tests=true"
    ):
        load_problems(load_config(QUICKSTART, counted), "eval")
    for runs_all in ("verifier.code.all_tests=true", "verifier.code.mode=paper"):
        assert len(load_problems(load_config(QUICKSTART, [*counted, runs_all]), "eval")) == 1


def test_limits_keep_the_first_problems() -> None:
    config = load_config(QUICKSTART, ["data.num_train=3", "data.num_eval=5"])
    assert len(load_problems(config, "train")) == 3
    assert len(load_problems(config, "eval")) == 5
    longer = load_problems(load_config(QUICKSTART, ["data.num_train=4"]), "train")
    assert longer[:3] == load_problems(config, "train")


PROBLEMS = make_problems("train", 22)


def test_each_epoch_sees_problems_at_most_once_in_a_new_order() -> None:
    epochs = [
        [p.id for step in steps for p in problems_of_step(PROBLEMS, step, 4, seed=0)]
        for steps in ((1, 2, 3, 4, 5), (6, 7, 8, 9, 10))
    ]
    for ids in epochs:
        assert max(Counter(ids).values()) == 1 and len(ids) == 20
    assert epochs[0] != epochs[1]


def test_a_step_depends_on_seed_and_number_alone() -> None:
    assert problems_of_step(PROBLEMS, 7, 4, seed=1) == problems_of_step(PROBLEMS, 7, 4, seed=1)
    assert problems_of_step(PROBLEMS, 7, 4, seed=1) != problems_of_step(PROBLEMS, 7, 4, seed=2)


def test_gold_answers_that_do_not_equal_themselves_are_bad_rows(tmp_path: Path) -> None:
    golds = ["5", r"\\frac{1}{2}", "9^{9^{9^{9}}}", "12:30", "A"]
    file = tmp_path / "problems.jsonl"
    rows = [{"id": f"row-{n}", "prompt": "?", "answer": gold, "task": "math"} for n, gold in enumerate(golds)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.train={file}", "verifier.workers=1", "verifier.math.seconds_per_answer=1"]
    config = load_config(QUICKSTART, [*settings, "data.on_bad_row=skip"])
    problems = load_problems(config, "train")
    with VerifierPool(config.verifier, ["math"]) as pool:
        kept = [problem.id for problem in judgeable(problems, pool, config, "train")]
        assert kept == ["row-0", "row-1", "row-3", "row-4"]
        with pytest.raises(UserError, match=r"problems.jsonl, id 'row-2': answer='9.*cannot be compared"):
            judgeable(problems, pool, load_config(QUICKSTART, settings), "train")


GOOD = '{"id": 1, "prompt": "1+1?", "answer": 2, "task": "math"}'


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_prompt_and_messages_are_both_read(tmp_path: Path) -> None:
    chat = (
        '{"id": "b", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], '
        '"answer": "x", "task": "arithmetic"}'
    )
    first, second = read_problems(write(tmp_path / "p.jsonl", GOOD, "", chat), key="data.train")
    assert (first.id, first.messages) == ("1", ({"role": "user", "content": "1+1?"},))
    assert [m["role"] for m in second.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 2, "prompt": "x", "task": "math"}', "line 2: answer: missing"),
        ('{"id": 2, "prompt": "x", "answer": 1, "task": "poetry"}', "line 2: task=poetry: choose arithmetic, choice"),
        ('{"id": 2, "answer": 1, "task": "math"}', "line 2: give exactly one of `prompt` and `messages`"),
        ('{"id": 2, "messages": [], "answer": 1, "task": "math"}', "line 2: `messages` must end with a user turn"),
        ("{", "line 2: not valid JSON"),
        (GOOD, "line 2: id '1' appears twice"),
    ],
)
def test_bad_rows_are_named_by_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_problems(write(tmp_path / "p.jsonl", GOOD, line), key="data.train")


def test_empty_or_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.eval=.*: the file has no rows"):
        read_problems(write(tmp_path / "p.jsonl"), key="data.eval")
    with pytest.raises(UserError, match=r"data.eval=nowhere: no such file"):
        read_problems("nowhere", key="data.eval")


USER = [{"role": "user", "content": "u"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"messages": [*USER, {"role": "user", "content": "\t"}]}, "the prompt is empty"),
        ({"messages": [{"role": "alien", "content": "u"}] * 2 + USER}, "role 'alien'.*choose system"),
        ({"prompt": "u", "id": ""}, "id: "),
    ],
)
def test_a_row_that_asks_nothing_or_knows_no_role_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": "a", "answer": "1", "task": "math"} | row) + "\n")
    with pytest.raises(UserError, match=rf"rows.jsonl, line 1: .*{message}"):
        read_problems(str(file), "data.train")


def test_what_has_changed_between_problems_is_counted() -> None:
    before = fingerprints(PROBLEMS[:6])
    assert changes(before, fingerprints(PROBLEMS[:6])) == ""
    assert changes(before, fingerprints([*PROBLEMS[1:6], PROBLEMS[0]])) == "another order"
    edited = replace(PROBLEMS[2], answer="another")
    assert changes(before, fingerprints([PROBLEMS[1], edited, *PROBLEMS[3:9]])) == "1 gone, 3 new, 1 changed"
    renamed = replace(PROBLEMS[0], id="renamed")
    assert changes(before, fingerprints([renamed, *PROBLEMS[1:6]])) == "1 gone, 1 new"


def routed(*settings: str) -> list[str]:
    problems = [replace(make_problems("train", 1)[0], id=task, task=task) for task in ("math", "choice", "code")]
    problems.append(replace(problems[0], id="own", teacher="b"))
    return [problem.teacher for problem in with_teachers(problems, load_config(QUICKSTART, settings))]


def test_a_problem_has_the_teacher_of_its_task_or_the_one_that_its_row_names() -> None:
    several = ("teachers.math={kind: frozen}", "teachers.b={kind: frozen, tasks: [choice, code]}")
    assert routed(*several) == ["math", "b", "b", "b"]
    assert routed() == [""] * 4, "with one teacher, the column says nothing"


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (
            ["b={kind: frozen, tasks: [math, choice]}"],
            "none of b teaches task 'code' of data.train=arithmetic .id 'code'",
        ),
        (["a={kind: frozen, tasks: [math, choice, code]}"], "row 'own' asks for teacher 'b', which is none of a"),
        (
            ["b={kind: frozen, tasks: [math, choice, code]}", "tool={kind: frozen}"],
            "teachers.tool: it teaches no problem of data.train=arithmetic",
        ),
    ],
)
def test_every_task_needs_a_teacher_and_every_teacher_a_task(teachers: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        routed(*(f"teachers.{teacher}" for teacher in teachers))


def test_teachers_that_rows_name_and_nothing_reads_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    named = [replace(problem, teacher="old") for problem in PROBLEMS[:3]]
    assert [problem.teacher for problem in with_teachers([*named, *PROBLEMS[3:5]], load_config(QUICKSTART))] == [""] * 5
    assert caplog.messages == [
        "data.train=arithmetic: 3 of 5 rows name a teacher, and the config has no teachers: these names are not read"
    ]
    caplog.clear()
    with_teachers(PROBLEMS, load_config(QUICKSTART))
    assert not caplog.messages


def test_another_teacher_of_a_row_is_a_change_of_the_problem() -> None:
    (problem,) = make_problems("train", 1)
    other = replace(problem, teacher="b")
    assert changes(fingerprints([problem]), fingerprints([other])) == "1 changed"
