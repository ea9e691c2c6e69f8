"""The Ray actor that trains, and scores as a teacher: NeMo-RL's Megatron worker with `MegatronTeacherMethods`."""

from __future__ import annotations

import ray
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

from mopd_nemo.engines.nemo.workers.megatron import MegatronTeacherMethods


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("megatron_policy_worker"))
class MegatronTeacherWorker(MegatronTeacherMethods, MegatronPolicyWorkerImpl):
    """See `MegatronTeacherMethods`."""
