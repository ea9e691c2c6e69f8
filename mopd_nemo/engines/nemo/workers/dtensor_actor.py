"""The Ray actor that trains, and scores as a teacher: NeMo-RL's DTensor worker with `DTensorTeacherMethods`."""

from __future__ import annotations

import ray
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers.dtensor_policy_worker_v2 import DTensorPolicyWorkerV2Impl

from mopd_nemo.engines.nemo.workers.dtensor import DTensorTeacherMethods


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("dtensor_policy_worker_v2"))
class DTensorTeacherWorker(DTensorTeacherMethods, DTensorPolicyWorkerV2Impl):
    """See `DTensorTeacherMethods`."""
