"""The shims: all that lets NeMo-RL's, Megatron-Bridge's and Megatron-Core's own code run without a GPU. Tests only.

- CUDA's devices, streams and generators are the CPU's, NCCL is gloo (`tests/integration/on_cpu.py`): no test is about
  a kernel of CUDA's. A GPU's number is 0, and nothing is bound to its NUMA node. Megatron's gather and reduce-scatter
  ask for a GPU's memory in the backward pass too, where torch needs to be told again.
- `transformer_engine`, `megatron.energon`, `modelopt` are empty packages: Bridge names them where it is imported, for
  formats and models that are not used here. Megatron-Core and Automodel are imported before, so they find no
  Transformer Engine and take layers of their own.
- Attention is torch's (`attention_class`), padded and packed: Megatron-Core's own knows no packed sequences. It comes
  in by the hook for layer specs that NeMo-RL's worker has.
- RMSNorm is torch's, Megatron's own choice without Transformer Engine; under sequence parallelism Megatron refuses it,
  because it does not mark its weights as ones whose gradients want summing. Here it does.
- Adam is torch's AdamW, which Megatron takes where there is no Transformer Engine or Apex. It makes its state at the
  first step, which a checkpoint asks for before, and counts steps for each parameter, where those count them for each
  group. Here state is made when asked for, and each parameter gets the number that a checkpoint has for its group.
- Bridge's adapters hear that there is no Transformer Engine: they ask whether Megatron-Core has names for its layers,
  which it has, as None.
- The index of Megatron's data sets is not compiled: there are none.
- `FullyShardedDataParallelV1` and `V2` are empty classes where Megatron-Core is older than Bridge expects.
- vLLM is transformers, in the driver (`sampler.py`), where a loop of NeMo-RL runs whole: the CPU's vLLM wants another
  torch. A refit, NeMo-RL's own up to there, gives it the weights by a file, since CUDA's handles of memory are CUDA's.
- Several workers start in one process one after the other (`forget_megatron`), where a cluster has a process for each.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tests.integration.on_cpu import redirect_cuda, redirect_megatron_generator, redirect_megatron_mappings

ROOT = Path(__file__).resolve().parents[3]
SOURCE = "NEMO_RL_SOURCE"
MEGATRON = {"MEGATRON_BRIDGE_SOURCE": "src/megatron/bridge", "MEGATRON_LM_SOURCE": "megatron/core"}
"""Checkouts to take in place of the packages of that name, and what must be in them."""


def nemo_rl_missing() -> str | None:
    """Why NeMo-RL, or its Megatron worker, cannot be imported here; or None."""
    source = os.environ.get(SOURCE)
    if source and not (Path(source) / "nemo_rl" / "algorithms").is_dir():
        return f"{SOURCE}={source}: no nemo_rl in it"
    if not source and not _found("nemo_rl", "nemo_rl.algorithms"):
        return f"NeMo-RL is not importable; set {SOURCE} to a checkout of it"
    for variable, inside in MEGATRON.items():
        if os.environ.get(variable) and not (Path(os.environ[variable]) / inside).is_dir():
            return f"{variable}={os.environ[variable]}: no {inside} in it"
    order_path()
    for package, name in (("megatron-core", "megatron.core"), ("megatron-bridge", "megatron.bridge")):
        if not _found("megatron", name):
            return f"{package} is not installed; make test-nemo installs it (docs/nemo.md)"
    return None


def _found(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def order_path() -> None:
    """This checkout, Megatron's, the installed packages, NeMo-RL's: it and Megatron-LM have a package `tests` too."""
    first = [str(ROOT)]
    for variable, inside in MEGATRON.items():
        if os.environ.get(variable):
            first.append(str(Path(os.environ[variable]).resolve() / inside.partition("megatron/")[0]).rstrip("/"))
    last = [os.environ[SOURCE]] if os.environ.get(SOURCE) else []
    sys.path[:] = first + [entry for entry in sys.path if entry not in (*first, *last)] + last


def source_path() -> str:
    """The PYTHONPATH that gives a new process the order of `order_path`."""
    order_path()
    megatron = [entry for entry in sys.path if Path(entry, "megatron").is_dir() and "site-packages" not in entry]
    return os.pathsep.join([str(ROOT), *megatron, os.environ.get(SOURCE, "")]).rstrip(os.pathsep)


def prepare() -> None:
    """Make NeMo-RL and its workers importable in this process, on the CPU. All of it once."""
    order_path()
    if torch.cuda.is_available() or any(isinstance(finder, _Absent) for finder in sys.meta_path):
        return
    for name in BEFORE_STUBS:
        importlib.import_module(name)
    sys.meta_path.append(_Absent())
    modelopt()
    redirect_cuda()
    redirect_start()
    adapter: Any = importlib.import_module("megatron.core.distributed.fsdp.mcore_fsdp_adapter")
    for name in ("FullyShardedDataParallelV1", "FullyShardedDataParallelV2"):
        if not hasattr(adapter, name):
            setattr(adapter, name, type(name, (), {}))


BEFORE_STUBS = (
    "megatron.core.extensions.transformer_engine",
    "megatron.core.models.gpt",
    "megatron.core.transformer.transformer_block",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.tensor_parallel",
    "megatron.core.fusions.fused_softmax",
    "megatron.core.fp8_utils",
    "megatron.core.transformer.moe.experts",
    "megatron.core.models.mamba",
    "megatron.core.ssm.mamba_mixer",
    "megatron.core.inference.engines",
    "megatron.core.dist_checkpointing",
    "nemo_rl.models.policy.utils",  # Automodel
)
"""Modules that ask whether there is a Transformer Engine, and shall hear the truth."""


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, last of all finders, packages that need CUDA to exist."""

    ROOTS = ("transformer_engine", "transformer_engine_torch", "megatron.energon", "modelopt")

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == root or name.startswith(f"{root}.") for root in self.ROOTS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Empty(types.ModuleType):
    """Every name of it is an empty class, or where it looks like a module's an empty module."""

    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Empty(f"{self.__name__}.{name}") if name[:1].islower() else type(name, (), {})
        setattr(self, name, value)
        return value


def modelopt() -> None:
    """No model is quantised, and none has a state of that to save."""
    quantised: Any = importlib.import_module("modelopt.torch.quantization.utils")
    quantised.is_quantized = lambda model: False
    plugins: Any = importlib.import_module("modelopt.torch.opt.plugins")
    for name in ("restore_modelopt_state", "save_modelopt_state", "save_sharded_modelopt_state"):
        setattr(plugins, name, _nothing)
    plugins.restore_sharded_modelopt_state = _nothing
    sharded: Any = importlib.import_module("modelopt.torch.opt.plugins.mcore_dist_checkpointing")
    sharded._load_extra_state_from_sharded_checkpoint = _nothing


def redirect_start() -> None:
    """What the start of a worker asks of NCCL, of a GPU and of a compiler."""
    import ray
    from megatron.bridge.peft import utils as adapters
    from megatron.bridge.training import initialize
    from nemo_rl.distributed import numa_utils
    from nemo_rl.models.megatron import setup

    modules: Any = (ray, initialize, adapters, numa_utils, setup, torch.distributed, torch.cuda)
    ray, initialize, adapters, numa_utils, setup, distributed, cuda = modules
    redirect_megatron_generator()
    redirect_megatron_mappings()
    ray.get_gpu_ids = lambda: [0]
    numa_utils.bind_to_gpu_numa = lambda *_: False
    initialize.compile_helpers = _nothing
    adapters.HAVE_TE = False
    start, on_gpu = distributed.init_process_group, setup.initialize_megatron
    distributed.init_process_group = lambda backend=None, *a, **own: start(
        "gloo", *a, **{name: value for name, value in own.items() if name != "device_id"}
    )

    def initialize_megatron(**own: Any) -> Any:
        """It refuses to start without CUDA; nothing else may believe that there is one."""
        here = cuda.is_available, cuda.device_count
        cuda.is_available, cuda.device_count = lambda: True, lambda: distributed.get_world_size()
        try:
            return on_gpu(**own)
        finally:
            cuda.is_available, cuda.device_count = here

    setup.initialize_megatron = initialize_megatron
    _adapt_adam()
    _mark_norms()
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

    register_allowed_target_prefix(f"{__name__}.")  # a checkpoint's configuration names `layer_spec`


def _adapt_adam() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer: Any = DistributedOptimizer
    own = optimizer.state_dict

    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return own(self)

    load = optimizer.load_state_dict

    def load_state_dict(self: Any, saved: Any) -> None:
        load(self, saved)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    optimizer.state_dict, optimizer.load_state_dict = state_dict, load_state_dict


def _mark_norms() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    norm: Any = WrappedTorchNorm
    own = norm.__new__

    def new(kind: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        made = own(kind, plain, *args, **kwargs)
        for weight in made.parameters():
            weight.sequence_parallel = config.sequence_parallel
        return made

    norm.__new__ = new


def attention_class() -> type:
    """Made where Megatron may be imported."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
    from megatron.core.transformer.module import MegatronModule

    class Attention(MegatronModule):
        """Causal attention in torch over [S, B, heads, d], or packed [T, heads, d] with the sequences' ends.

        Where keys outnumber queries, the mask is aligned with the last ones or the first, as Transformer Engine's are.
        Under context parallelism a rank has two pieces of each sequence, one from its front and one from its back.
        """

        def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
            super().__init__(config=config)
            self.scale = softmax_scale

        def forward(
            self,
            query: Any,
            key: Any,
            value: Any,
            *_: Any,
            attn_mask_type: Any,
            packed_seq_params: Any = None,
            **__: Any,
        ) -> torch.Tensor:
            if packed_seq_params is None:
                return self._attend(query, key, value).flatten(2)
            ranks = parallel_state.get_context_parallel_world_size()
            padded = (getattr(packed_seq_params, f"cu_seqlens_{part}_padded") // ranks for part in ("q", "kv"))
            query_ends, key_ends = (itertools.pairwise(ends.tolist()) for ends in padded)
            bottom_right = attn_mask_type.name == "padding_causal_bottom_right"
            parts = []
            for (start, end), (first, last) in zip(query_ends, key_ends, strict=True):
                before = last - first - (end - start) if bottom_right else 0
                attended = self._attend(query[start:end, None], *(x[first:last, None] for x in (key, value)), before)
                parts.append(attended.squeeze(1))
            return torch.cat([*parts, torch.zeros_like(query[sum(map(len, parts)) :])]).flatten(1)

        def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: int = 0) -> torch.Tensor:
            group, ranks = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_world_size()
            places = [torch.arange(len(query)) + before]
            columns = torch.arange(len(key))
            if ranks > 1:
                key, value = (gather_from_sequence_parallel_region(part, group=group) for part in (key, value))
                piece = torch.arange(len(query) // 2)
                places = [
                    torch.cat([piece + len(piece) * number for number in (rank, 2 * ranks - 1 - rank)])
                    for rank in range(ranks)
                ]
                columns = torch.cat(places)
            rows = places[parallel_state.get_context_parallel_rank()]
            out = torch.nn.functional.scaled_dot_product_attention(
                *(part.permute(1, 2, 0, 3) for part in (query, key, value)),
                attn_mask=columns <= rows[:, None],
                scale=self.scale,
                enable_gqa=True,
            )
            return out.permute(2, 0, 1, 3)

    return Attention


def layer_spec(config: Any) -> Any:
    """Megatron-Core's own layers, without Transformer Engine, and with `Attention`."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    spec = local_layer_spec(config)
    spec.submodules.self_attention.submodules.core_attention = attention_class()
    return spec


def refit_file() -> Path:
    """Where a refit goes, beside the models that workers have converted."""
    return Path(os.environ["NRL_MEGATRON_CHECKPOINT_DIR"]) / "refit.pt"


def forget_megatron() -> None:
    """End the Megatron of this process so that another can start in it."""
    from megatron.bridge.training import initialize
    from megatron.core import parallel_state

    with contextlib.suppress(AttributeError):
        initialize.destroy_global_state()
    parallel_state.destroy_model_parallel()


def _nothing(*_: Any, **__: Any) -> None:
    return None


if __name__ == "__main__":  # python -m tests.integration.nemo.cpu -m MODULE ARGUMENTS: the module, on the CPU
    import runpy

    from tests.integration.nemo import cpu  # by its name, which checkpoints know

    cpu.prepare()
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
