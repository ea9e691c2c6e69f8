from collections.abc import Callable
from typing import Any

import pytest

from mopd_nemo.chat import Chat, with_prompt_ids
from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config
from mopd_nemo.preflight.contexts import CONTEXTS
from mopd_nemo.preflight.figures import figures
from mopd_nemo.preflight.measure import Plan, Survey, measure, sample_groups
from mopd_nemo.verifiers.pool import VerifierPool
from tests.conftest import QUICKSTART
from tests.preflight.planted import PlantedEngine, arithmetic

PLAN = Plan(contexts=CONTEXTS, problems=24, max_groups=64, samples=8, seed="test", order=0)


@pytest.fixture(scope="session")
def settings() -> Config:
    return load_config(QUICKSTART, ["rollout.num_prompts_per_step=8", "rollout.batch_size=64", "peers.failures=1"])


@pytest.fixture(scope="session")
def figures_of(chat: Chat, settings: Config) -> Callable[..., dict[str, Any]]:
    """The figures of a planted model, from sampling to intervals."""

    def build(plan: Plan = PLAN, **habits: float) -> dict[str, Any]:
        problems = with_prompt_ids(arithmetic(plan.max_groups), chat, 128)
        engine = PlantedEngine(chat, problems, **habits)
        found = Survey(plan, chat, settings)
        with VerifierPool(settings.verifier, {"arithmetic"}) as verifiers:
            list(sample_groups(problems, engine, verifiers, settings, plan, found))  # type: ignore[arg-type]
            rows = measure(found.cases, engine, verifiers, settings, plan)  # type: ignore[arg-type]
            return figures(found, {(row["problem"], row["context"]): row for row in rows}, settings, plan)

    return build
