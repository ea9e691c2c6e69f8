"""The verifiers as a NeMo-RL environment (v0.7.0's `EnvironmentInterface`), for stock NeMo-RL recipes.

Call `register_environments()` in the driver before NeMo-RL makes its environments; then, in a recipe:

    env:
      mopd_math: {task: math, verifier: {workers: 8}}

The environment's config is `task` and, under `verifier`, any setting of the `verifier` block of our config. A sample's
`extra_env_info` holds the gold answer as `answer`, or as `ground_truth`, which is what NeMo-RL's own math processor
writes. Importing this module needs neither nemo_rl nor ray.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mopd_nemo.chat import OPEN, opens_thinking
from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.engines.nemo import has_nemo_rl
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers import TASKS
from mopd_nemo.verifiers.pool import VerifierPool

logger = logging.getLogger(__name__)


class ResponseJudge:
    """The environment without Ray: it judges the assistant's last turn of every conversation.

    Args:
        cfg: `{task, verifier}`.

    Raises:
        UserError: the task is unknown.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        config = VerifierConfig.model_validate(cfg.get("verifier", {}))
        known = [*TASKS, *config.custom, *config.http]
        if cfg.get("task") not in known:
            raise UserError(f"task={cfg.get('task')!r}: unknown; choose one of {', '.join(known)}")
        self.task: str = cfg["task"]
        self.pool = VerifierPool(config, [self.task])
        self.num_judged = 0
        self.num_errors = 0

    def judge(
        self, message_logs: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Verdict]:
        """One verdict a conversation, in order. Truncation cannot be seen here, so no response counts as truncated."""
        futures = [
            self.pool.submit(self.task, _last_response(log), _answer(info))
            for log, info in zip(message_logs, metadata, strict=True)
        ]
        verdicts = [future.result() for future in futures]
        errors = sum(verdict.outcome is Outcome.VERIFIER_ERROR for verdict in verdicts)
        self.num_judged += len(verdicts)
        self.num_errors += errors
        if errors:
            logger.warning("%d of %d responses could not be judged; NeMo-RL sees reward 0", errors, len(verdicts))
        return verdicts

    def metrics(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Of a finished batch (`rewards` [B], `is_end` [B]) and of all responses that this actor has judged."""
        return {
            "accuracy": batch["rewards"].float().mean().item(),
            "fraction_of_samples_properly_ended": batch["is_end"].float().mean().item(),
            "verifier_error_fraction": self.num_errors / max(self.num_judged, 1),
        }


def _last_response(log: Sequence[Mapping[str, Any]]) -> str:
    """The assistant's last turn, after the opening thinking tag if the template before it has opened a block."""
    for index in reversed(range(len(log))):
        if log[index]["role"] == "assistant":
            before = "".join(str(message["content"]) for message in log[:index])
            return (OPEN if opens_thinking(before) else "") + str(log[index]["content"])
    return ""


def _answer(info: Mapping[str, Any]) -> Any:
    return info["answer"] if "answer" in info else info["ground_truth"]


def observation(verdict: Verdict) -> dict[str, str]:
    """The environment's message: the outcome, then the verifier's feedback on a failure."""
    return {"role": "environment", "content": f"Environment: {verdict.outcome}\n{verdict.feedback}".rstrip()}


if has_nemo_rl():
    import ray  # pyrefly: ignore[missing-import]
    from nemo_rl.environments.interfaces import (  # pyrefly: ignore[missing-import]
        EnvironmentInterface,
        EnvironmentReturn,
    )

    @ray.remote(max_restarts=-1, max_task_retries=-1)
    class VerifierEnvironment(EnvironmentInterface):
        """One verifier with its pool of workers, as a Ray actor. Every conversation ends after one turn."""

        def __init__(self, cfg: dict[str, Any]) -> None:
            self._judge = ResponseJudge(cfg)

        def step(
            self, message_log_batch: list[list[dict[str, Any]]], metadata: list[dict[str, Any]]
        ) -> EnvironmentReturn:
            """Judge a batch. Rewards [B] float32; 0 for a response that could not be judged, which is logged.

            The metadata that comes back also has the whole `verdict`, for a teacher that shows peers.
            """
            verdicts = self._judge.judge(message_log_batch, metadata)
            return EnvironmentReturn(
                observations=[observation(verdict) for verdict in verdicts],
                metadata=[{**info, "verdict": verdict} for info, verdict in zip(metadata, verdicts, strict=True)],
                next_stop_strings=[None] * len(verdicts),
                rewards=torch.tensor([verdict.reward for verdict in verdicts], dtype=torch.float32),
                terminateds=torch.ones(len(verdicts)),
                answers=[verdict.details.get("found") for verdict in verdicts],
            )

        def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
            """An unfinished response gets reward 0, as in NeMo-RL's own environments."""
            batch["rewards"] = batch["rewards"] * batch["is_end"]
            return batch, self._judge.metrics(batch)

        def shutdown(self) -> None:
            """End the workers."""
            self._judge.pool.close()


def register_environments() -> list[str]:
    """Make `mopd_math`, `mopd_choice`, `mopd_tool`, `mopd_code` and `mopd_arithmetic` known to NeMo-RL; their names.

    Raises:
        UserError: NeMo-RL is not on the path.
    """
    if not has_nemo_rl():
        raise UserError("nemo_rl is not importable: put a NeMo-RL checkout on PYTHONPATH")
    registry = importlib.import_module("nemo_rl.distributed.ray_actor_environment_registry")
    executables = importlib.import_module("nemo_rl.distributed.virtual_cluster").PY_EXECUTABLES
    environments = importlib.import_module("nemo_rl.environments.utils")

    actor = f"{__name__}.VerifierEnvironment"
    registry.ACTOR_ENVIRONMENT_REGISTRY[actor] = executables.SYSTEM
    names = [f"mopd_{task}" for task in TASKS]
    for name in names:
        if name not in environments.ENV_REGISTRY:
            environments.register_env(name, actor)
    return names
