"""NeMo-RL's Megatron worker with `TeacherMethods`, as a Ray actor on a CPU: its methods are real, its start is not.

The start needs Megatron-Bridge and CUDA; here the same attributes are set with a `GPTModel` from a Hugging Face
checkpoint, Megatron's DDP and its distributed optimiser. Saving and loading go through Bridge too, so here they are
plain files.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.integration.nemo import cpu

cpu.prepare()

import ray  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from nemo_rl.models.policy.workers import megatron_policy_worker  # noqa: E402
from nemo_rl.utils.timer import Timer  # noqa: E402

from mopd_nemo.engines.nemo.teacher_worker import TeacherMethods  # noqa: E402
from tests.integration.nemo.qwen3 import build, start_megatron  # noqa: E402
from tests.integration.on_cpu import redirect_devices  # noqa: E402

megatron_policy_worker.maybe_finalize_async_save = lambda *_, **__: None
megatron_policy_worker.get_pg_collection = lambda _: SimpleNamespace(mp=None)
megatron_policy_worker.logical_and_across_model_parallel_group = lambda value, mp_group: value
megatron_policy_worker.reduce_max_stat_across_model_parallel_group = lambda value, mp_group: value


class CpuWorkerImpl(TeacherMethods, megatron_policy_worker.MegatronPolicyWorkerImpl):
    """See the module."""

    @staticmethod
    def configure_worker(num_gpus: Any, bundle_indices: Any = None, **_: Any) -> tuple[dict[str, Any], ...]:
        return {"num_gpus": 0}, {}, {}, {}

    def __init__(self, config: Any, tokenizer: Any, weights_path: str | None = None, **kwargs: Any) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        redirect_devices()
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.cfg = config
        self.tokenizer = tokenizer
        self.rank = dist.get_rank()
        megatron = config["megatron_cfg"]
        tp, pp = megatron["tensor_model_parallel_size"], megatron["pipeline_model_parallel_size"]
        start_megatron(tp, pp, megatron["context_parallel_size"])
        module = build(
            Path(config["model_name"]),
            attention=not config["sequence_packing"]["enabled"],
            tied=True,
            calculate_per_token_loss=True,
            finalize_model_grads_func=finalize_model_grads,
        )
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(module.config, ddp, module)
        settings = megatron["optimizer"]
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            adam_beta1=settings["adam_beta1"],
            adam_beta2=settings["adam_beta2"],
            adam_eps=settings["adam_eps"],
            clip_grad=settings["clip_grad"],
            params_dtype=torch.float32,
            use_distributed_optimizer=True,
        )
        self.optimizer = None
        if kwargs["init_optimizer"]:
            self.optimizer = get_megatron_optimizer(optimizer, [self.model])
            self.optimizer.grad_norms_by_group = {}
        self.scheduler = SimpleNamespace(get_lr=lambda group: group["lr"], get_wd=lambda: 0.0, step=self._schedule)
        self.mcore_state = SimpleNamespace(straggler_timer=None, cfg=SimpleNamespace(checkpoint=None))
        self.megatron_cfg = SimpleNamespace(optimizer=SimpleNamespace(), ddp=SimpleNamespace())
        self.dp_size = dist.get_world_size() // (tp * pp * megatron["context_parallel_size"])
        self.dtype = torch.float32
        self.defer_fp32_logits = False
        self.delegate_pack_to_model = False
        self.draft_model = self.sampling_params = None
        self.fp8_cfg = None
        self.offload_optimizer_for_logprob = self.optimizer_cpu_offload = False
        self.should_disable_forward_pre_hook = False
        self._first_train_step_forward_pre_hook_disabled = False
        self._router_replay_enabled = False
        # Only on NeMo-RL's main branch:
        self.timer = Timer()
        self.offload_optimizer_for_refit = True
        self.delegate_mtp_loss_mask_to_model = self.model_slices_context_parallel_inputs = False
        self.media_placeholder_token_id = None
        if weights_path is not None:
            saved = torch.load(Path(weights_path) / f"{self.rank}.pt", weights_only=False)
            self.model.load_state_dict(saved["model"])
            self._adam().load_state_dict(saved["adam"])

    def _schedule(self, increment: int) -> None:
        """Megatron's own schedule sets its own rate after every update."""
        for group in self.optimizer.param_groups:
            group["lr"] = 1e9

    def save_checkpoint(self, weights_path: str, optimizer_path: str | None = None, **_: Any) -> None:
        Path(weights_path).mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "adam": self._adam().state_dict()}
        torch.save(state, Path(weights_path) / f"{self.rank}.pt")

    def _adam(self) -> Any:
        """Its master weights are the model's own: all is float32 here."""
        (optimizer,) = self.optimizer.chained_optimizers
        return optimizer.optimizer

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's parameters; for looking at."""
        return {name: parameter.detach().clone() for name, parameter in self.model.module.named_parameters()}


@ray.remote
class CpuWorker(CpuWorkerImpl):
    """Ray pickles this one with all that its own methods mention; so it has none."""
