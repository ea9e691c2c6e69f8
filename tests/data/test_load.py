import json
from pathlib import Path

from mopd_nemo.config.load import load_config
from mopd_nemo.data import load_problems
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
