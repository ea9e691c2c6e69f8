import json
from collections import Counter
from pathlib import Path

from mopd_nemo.config.load import load_config
from mopd_nemo.data.arithmetic import make_problems
from mopd_nemo.data.load import load_problems, problems_of_step
from tests.conftest import QUICKSTART


def test_suffix_ends_the_user_turn_of_both_splits(tmp_path: Path) -> None:
    rows = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"id": "a", "messages": rows, "answer": "1", "task": "math"}) + "\n")
    config = load_config(QUICKSTART, [f"data.train={file}", "data.num_eval=1", "data.prompt_suffix=' Summarise.'"])
    (train,), (held_out,) = load_problems(config, "train"), load_problems(config, "eval")
    assert [message["content"] for message in train.messages] == ["s", "u Summarise."]
    assert held_out.messages[-1]["content"].endswith("{digit}. Summarise.")


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
