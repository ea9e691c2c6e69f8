"""Scoring as a user runs it: stopped, continued, refused, restarted."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, condition_contexts
from mopd_nemo.analysis.teacher_signal.output import collect, to_markdown, write_result
from mopd_nemo.analysis.teacher_signal.scoring import ScoreStore, manifest_of, score_rollouts
from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, UserError
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.files import read_rows, write_rows
from mopd_nemo.run.rollouts import read_groups, rollout_records, to_rollout_group
from tests.conftest import make_group
from tests.engines.local.conftest import config as local_config

RIGHT, WRONG = [f"step {i} \\boxed{{2}}" for i in range(3)], [f"wrong {i}" for i in range(3)]
GROUPS = 10


@pytest.fixture
def rollouts(chat: Chat, tmp_path: Path) -> Path:
    groups = []
    for number in range(GROUPS):
        responses = [(f"{text} {number}", 1.0) for text in RIGHT] + [(f"{text} {number}", 0.0) for text in WRONG]
        question = {"role": "user", "content": f"What is {number}+2?"}
        group = make_group(chat, responses, messages=[question])  # type: ignore[list-item]
        object.__setattr__(group.problem, "id", f"p{number}")
        groups.append(group)
    file = tmp_path / "rollouts.jsonl"
    write_rows(file, rollout_records(0, groups, None, chat))
    return file


@pytest.fixture
def config(random_model: Path) -> Config:
    return local_config(random_model, "rollout.num_prompts_per_step=5")


class StopError(Exception):
    pass


class FragileEngine:
    """A local engine that counts what it scores and stops after some calls."""

    def __init__(self, config: Config, calls: int = 1000) -> None:
        self._engine = LocalEngine(config)
        self.chat = self._engine.chat
        self.calls, self.scored = calls, 0

    def response_logprobs(self, prompts: Sequence[Any], responses: Sequence[Any], on_progress: Any = None) -> Any:
        if self.calls == 0:
            raise StopError
        self.calls -= 1
        self.scored += len(prompts)
        return self._engine.response_logprobs(prompts, responses, on_progress)


def score(rollouts: Path, config: Config, directory: Path, calls: int = 1000) -> tuple[ScoreStore, FragileEngine]:
    store, engine = ScoreStore(directory, manifest_of(rollouts, GROUPS, config)), FragileEngine(config, calls)
    score_rollouts(read_groups(rollouts), rollouts, engine, config, store)  # type: ignore[arg-type]
    return store, engine


def test_a_stopped_run_continues_and_gives_the_same_scores(rollouts: Path, config: Config, tmp_path: Path) -> None:
    whole, engine = score(rollouts, config, tmp_path / "whole")
    with pytest.raises(StopError):
        score(rollouts, config, tmp_path / "parts", calls=1)
    file = tmp_path / "parts" / "scores.jsonl"
    kept = read_rows(file)
    assert len(kept) == 5 * len(CONDITIONS)  # one block
    file.write_bytes(file.read_bytes()[:-40])  # and the kill cut the last line short
    continued, second = score(rollouts, config, tmp_path / "parts")
    assert second.scored == engine.scored // 2 + 6  # the other block, and the row that was cut
    for group in read_groups(rollouts):
        for name in CONDITIONS:
            assert continued[group.key, name]["scores"] == pytest.approx(whole[group.key, name]["scores"], abs=1e-5)
    assert len(read_rows(file)) == GROUPS * len(CONDITIONS)


def test_scores_are_mean_logprobs_after_the_training_prompt(rollouts: Path, config: Config, tmp_path: Path) -> None:
    store, engine = score(rollouts, config, tmp_path / "out")
    groups = [to_rollout_group(group, engine.chat, rollouts) for group in read_groups(rollouts)[:5]]
    context = condition_contexts(groups, engine.chat, config.peers, f"{config.seed}/0")["2S+1F"][3][4].context
    assert context.prompt_ids is not None
    response = groups[3].rollouts[4].response_ids
    (logprobs,) = engine.response_logprobs([context.prompt_ids], [response])
    assert store["0/p3", "2S+1F"]["scores"][4] == pytest.approx(sum(logprobs) / len(response), abs=1e-5)


def test_nothing_is_scored_twice(rollouts: Path, config: Config, tmp_path: Path) -> None:
    score(rollouts, config, tmp_path / "out")
    _, again = score(rollouts, config, tmp_path / "out", calls=0)
    assert again.scored == 0


@pytest.mark.parametrize("what", ["rollouts", "model", "peers", "number of prompts"])
def test_scores_of_something_else_are_refused(
    what: str, rollouts: Path, config: Config, tmp_path: Path, random_model: Path
) -> None:
    out = tmp_path / "out"
    ScoreStore(out, manifest_of(rollouts, GROUPS, config))
    if what == "rollouts":
        rollouts.write_text(rollouts.read_text().replace("wrong 0", "wrong 9", 1))
    elif what == "model":
        other = tmp_path / "model"
        other.mkdir()
        for file in random_model.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        weights = bytearray((other / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (other / "model.safetensors").write_bytes(weights)
        config = local_config(other, "rollout.num_prompts_per_step=5")
    elif what == "peers":
        config = local_config(random_model, "rollout.num_prompts_per_step=5", "peers.order=shortest")
    manifest = manifest_of(rollouts, 3 if what == "number of prompts" else GROUPS, config)
    with pytest.raises(
        UserError, match=rf"scores.jsonl: .* other values of {what}; choose another --output, or .*--restart"
    ):
        ScoreStore(out, manifest)
    ScoreStore(out, manifest, restart=True)


def test_a_file_in_place_of_the_directory_is_refused(rollouts: Path, config: Config) -> None:
    for place in (rollouts, rollouts / "below"):
        with pytest.raises(UserError, match=r"--output .*: a file is in its place; name a directory"):
            ScoreStore(place, manifest_of(rollouts, GROUPS, config))


def test_the_result_survives_scores_that_are_not_finite(rollouts: Path, config: Config, tmp_path: Path) -> None:
    class Broken(FragileEngine):
        def response_logprobs(self, prompts: Sequence[Any], responses: Sequence[Any], on_progress: Any = None) -> Any:
            rows = super().response_logprobs(prompts, responses)
            return [(float("nan"),), *rows[1:]]

    store = ScoreStore(tmp_path, manifest_of(rollouts, GROUPS, config))
    groups = read_groups(rollouts)
    score_rollouts(groups, rollouts, Broken(config), config, store)  # type: ignore[arg-type]
    result = collect(groups, store, {"rollouts": "r"})
    assert result["contexts"]["none"]["not_finite"] == 2  # one a call, two calls
    assert result["contexts"]["none"]["unscored"] == 2
    assert result["common"]["none"]["num_prompts"] > 0
    for path in write_result(result, tmp_path):
        assert path.stat().st_size > 0
    assert json.loads((tmp_path / "teacher_signal.json").read_text()) == json.loads(json.dumps(result))
    assert to_markdown(result).count("| no peers |") == 7  # all ten prompts are of one difficulty
