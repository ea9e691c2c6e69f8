"""`mopd init`, `mopd train --dry-run` and the summary that a run begins with."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mopd_nemo.config.load import load_config
from mopd_nemo.data.arithmetic import make_problems
from mopd_nemo.data.load import write_problems
from mopd_nemo.outlook import num_parameters, summary
from tests.conftest import EMBEDDED, QUICKSTART, Mopd

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with problems of one's own."""
    monkeypatch.chdir(tmp_path)
    write_problems(tmp_path / "train.jsonl", make_problems("train", 5))
    write_problems(tmp_path / "eval.jsonl", make_problems("eval", 3))
    return tmp_path


def test_a_config_of_init_passes_the_dry_run_and_trains_as_written(place: Path, mopd: Mopd) -> None:
    code, printed = mopd("init", str(EMBEDDED), "train.jsonl", "--eval", "eval.jsonl")
    assert code == 0, printed
    config = load_config(place / "mine.yaml")
    longest = int(re.findall(r"the longest prompt has (\d+)", printed)[0])
    assert longest <= config.data.max_prompt_tokens < longest + 64
    assert config.peers.max_peer_tokens == config.rollout.max_response_tokens == 576
    assert config.peers.max_context_tokens + config.rollout.max_response_tokens <= 2048
    assert config.rollout.num_prompts_per_step == 5 and "5 problems: 5 arithmetic" in printed
    quickstart = load_config(QUICKSTART)
    assert config.optimizer.learning_rate == 1e-5 != quickstart.optimizer.learning_rate
    assert config.data.num_train is config.data.num_eval is None

    code, printed = mopd("train", "--config", "mine.yaml", "--dry-run")
    assert code == 0 and "Nothing found that would stop this run" in printed
    assert "5 of the 5 of data.train=train.jsonl; 3 of the 3 of data.eval=eval.jsonl" in printed
    assert "here would stand a whole success" in printed and re.search(r"memory +\S+ [MG]B at most, in update", printed)
    assert sorted(path.name for path in place.iterdir()) == ["eval.jsonl", "mine.yaml", "train.jsonl"]

    code, printed = mopd("train", "--config", "mine.yaml", "train.num_steps=1", "run_dir=run")
    assert code == 0 and "from        the beginning" in printed and "run         run" in printed
    code, printed = mopd("train", "--resume", "run", "train.num_steps=2")
    assert code == 0 and "from        step 1" in printed


def test_a_dry_run_names_everything_that_would_stop_the_run(place: Path, mopd: Mopd) -> None:
    (place / "train.jsonl").write_text(json.dumps({"id": "a", "prompt": "", "answer": "1", "task": "math"}))
    words = ["train", "-c", str(QUICKSTART), "--dry-run", "data.train=train.jsonl", "data.eval=none.jsonl"]
    words += ["rollout.max_response_tokens=4096", "run_dir=train.jsonl/run"]
    code, printed = mopd(*words)
    assert code == 2
    for error in (
        "run_dir=train.jsonl/run: cannot write in",
        "rollout.max_response_tokens=4096 exceeds the 2048 positions",
        "train.jsonl, line 1: the prompt is empty",
        "data.eval=none.jsonl: no such file",
    ):
        assert error in printed
    assert len(list(place.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init", "none/of/this", "train.jsonl"], "model.path=none/of/this: no such directory"),
        (["init", str(EMBEDDED), "none.jsonl"], "DATA_FILE=none.jsonl: no such file"),
        (["init", str(EMBEDDED), "train.jsonl", "--eval", "none.jsonl"], "--eval=none.jsonl: no such file"),
        (["init", str(EMBEDDED), "train.jsonl", "-o", "eval.jsonl"], "--output eval.jsonl: exists"),
        (["init", str(EMBEDDED), "long.jsonl"], "2048 positions have no room for prompts of"),
        (["train", "--resume", "run", "--dry-run"], "--dry-run looks at a new run"),
    ],
)
def test_bad_input_is_a_message(
    words: list[str],
    message: str,
    place: Path,
    mopd: Mopd,
) -> None:
    row = {"id": "a", "prompt": "1+1? " * 800, "answer": "2", "task": "arithmetic"}
    (place / "long.jsonl").write_text(json.dumps(row) + "\n")
    before = sorted(place.iterdir())
    code, printed = mopd(*words)
    assert code == 2 and message in printed
    assert sorted(place.iterdir()) == before


def test_the_base_config_for_real_models_has_no_number_of_the_toy() -> None:
    file = ROOT / "configs" / "base" / "real.yaml"
    own, toy = load_config(file), load_config(QUICKSTART)
    assert own.peers.max_peer_tokens == own.rollout.max_response_tokens == 4096
    assert (own.optimizer.learning_rate, own.data.num_train, own.data.num_eval) == (1e-5, None, None)
    assert own.peers.max_peer_tokens != toy.peers.max_peer_tokens and "defaults" not in yaml.safe_load(file.read_text())


def test_the_summary_says_how_many_problems_are_left_out() -> None:
    lines = "\n".join(summary(load_config(QUICKSTART), Path("runs/x"), "step 4"))
    assert "512 of the 4096 of data.train=arithmetic; 128 of the 512 of data.eval=arithmetic" in lines
    assert "run         runs/x" in lines and "from        step 4" in lines
    assert num_parameters("embedded:arithmetic") > 1e5 and num_parameters("some/hub-name") == 0
