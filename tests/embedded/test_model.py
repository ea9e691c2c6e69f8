"""The shipped model is what the documentation says: half right on its own, and a reader of peers."""

from statistics import fmean

import pytest

from mopd_nemo.chat import with_prompt_ids
from mopd_nemo.config.load import load_config
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.data.load import load_problems
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.evaluation import evaluate
from mopd_nemo.methods.mopd import Mopd
from mopd_nemo.types import RolloutGroup
from mopd_nemo.verifiers.pool import PendingVerdicts, VerifierPool
from tests.conftest import QUICKSTART


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(load_config(QUICKSTART, ["teacher.kind=live"]))


@pytest.fixture(scope="module")
def groups(engine: LocalEngine) -> list[RolloutGroup]:
    config = load_config(QUICKSTART, ["data.num_eval=64", "teacher.kind=live"])
    with VerifierPool(config.verifier, ["arithmetic"]) as verifiers:
        problems = with_prompt_ids(load_problems(config, "eval"), engine.chat, config.data.max_prompt_tokens)
        metrics, groups = evaluate(engine, verifiers, problems, config)
    assert 0.3 < metrics["mean@8"] < 0.6
    assert metrics["pass@8"] > 0.9
    return groups


@pytest.mark.parametrize(
    ("settings", "gain"),
    [
        (["peers.successes=1", "peers.failures=0"], 0.25),
        (["peers.successes=2", "peers.failures=1"], 0.25),
        (["peers.successes=0", "peers.failures=1"], 0.1),
    ],
)
def test_peers_in_the_prompt_make_it_better(
    engine: LocalEngine, groups: list[RolloutGroup], settings: list[str], gain: float
) -> None:
    examples = Mopd(load_config(QUICKSTART, settings), engine.chat).build(groups, step=1).examples[::4]
    prompts = [example.teacher_prompt_ids or () for example in examples]
    answers = engine.generate(Request(prompts, 1, Sampling(96), "with peers"))
    problems = [groups[example.group_index].problem for example in examples]
    with VerifierPool(VerifierConfig(), ["arithmetic"]) as verifiers:
        informed = fmean(
            PendingVerdicts(verifiers, engine.chat).collect([problem], [answer])[0][0].reward
            for problem, answer in zip(problems, answers, strict=True)
        )
    alone = fmean(verdict.reward for group in groups for verdict in group.verdicts)
    assert informed > alone + gain
