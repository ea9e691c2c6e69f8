"""NeMo-RL's Megatron worker with `MegatronTeacherMethods`, unchanged, on a CPU: its start is real, over gloo.

A Ray actor for tests of the engine; `ranks.start` makes one in a process of a test.
"""

from __future__ import annotations

from typing import Any

from tests.integration.nemo import cpu

cpu.prepare()

import ray  # noqa: E402
import torch  # noqa: E402
from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl  # noqa: E402

from mopd_nemo.engines.nemo.workers.megatron import MegatronTeacherMethods  # noqa: E402
from tests.integration.on_cpu import redirect_devices  # noqa: E402


class CpuWorkerImpl(MegatronTeacherMethods, MegatronPolicyWorkerImpl):
    """See the module."""

    _transformer_layer_spec = staticmethod(cpu.layer_spec)

    @staticmethod
    def configure_worker(num_gpus: Any, bundle_indices: Any = None, **_: Any) -> tuple[dict[str, Any], ...]:
        return {"num_gpus": 0}, {}, {}, {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        redirect_devices()  # of this thread
        torch.set_num_threads(1)
        super().__init__(*args, **kwargs)

    def get_free_memory_bytes(self) -> int:
        """Of no GPU: no driver can be asked."""
        return 2**30

    def stream_weights_via_ipc_zmq(self, **_: Any) -> None:
        """The refit's weights by a file, where CUDA hands over memory; see `sampler`."""
        weights = self.exported()
        if self.rank == 0:
            torch.save(weights, cpu.refit_file())

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's parameters; for looking at."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def exported(self) -> dict[str, torch.Tensor]:
        """What a refit would send to vLLM: the whole Hugging Face model, on every rank."""
        self.prepare_refit_info()
        return {name: tensor.clone() for name, tensor in self._iter_params_with_optional_kv_scales()}


@ray.remote
class CpuWorker(CpuWorkerImpl):
    """Ray pickles this one with all that its own methods mention; so it has none."""
