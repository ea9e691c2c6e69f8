"""NeMo-RL's DTensor worker with `DTensorTeacherMethods`, as a Ray actor on a CPU: its start is real too, over gloo."""

from __future__ import annotations

from typing import Any

from tests.integration.nemo import cpu

cpu.prepare()

import ray  # noqa: E402
import torch  # noqa: E402
from nemo_rl.distributed import numa_utils  # noqa: E402
from nemo_rl.models.automodel import setup  # noqa: E402
from nemo_rl.models.policy.workers import dtensor_policy_worker_v2  # noqa: E402

from mopd_nemo.engines.nemo.workers.dtensor import DTensorTeacherMethods  # noqa: E402
from tests.integration.on_cpu import redirect_devices  # noqa: E402


class CpuDTensorWorkerImpl(DTensorTeacherMethods, dtensor_policy_worker_v2.DTensorPolicyWorkerV2Impl):
    """See the module."""

    @staticmethod
    def configure_worker(num_gpus: Any, bundle_indices: Any = None, **_: Any) -> tuple[dict[str, Any], ...]:
        return {"num_gpus": 0}, {}, {}, {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        redirect_devices()
        torch.set_num_threads(1)
        on_gloo()
        super().__init__(*args, **kwargs)

    def exported(self) -> dict[str, torch.Tensor]:
        """The whole Hugging Face model, on every rank: what a refit sends."""
        return {
            name: getattr(value, "full_tensor", lambda value=value: value)().detach().clone()
            for name, value in self.model.state_dict().items()
        }


def on_gloo() -> None:
    """What the start asks of NCCL and of a GPU's number comes from gloo and is zero."""
    ray.get_gpu_ids = lambda: [0]
    torch.cuda.current_device = lambda: 0
    numa_utils.bind_to_gpu_numa = lambda _: False
    start = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend=None, **own: start("gloo", **own)
    config = setup.FSDP2Config
    setup.FSDP2Config = lambda **own: config(**own | {"backend": "gloo"})


@ray.remote
class CpuDTensorWorker(CpuDTensorWorkerImpl):
    """Ray pickles this one with all that its own methods mention; so it has none."""
