"""Our config as NeMo-RL's `policy` block, with the keys of its example configs.

NeMo-RL has no default for most keys, so all are written out. `nemo.policy` overrides any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mopd_nemo.config import Config, LoraConfig
from mopd_nemo.config.checks import teacher_prompt
from mopd_nemo.config.cluster import MEGATRON_LAYERS, ParallelConfig, scoring_tokens, sequence_multiple
from mopd_nemo.embedded import resolve_model_path

ITERATIONS = 10**6
"""Length of Megatron's own schedule, which is flat: the trainer sets each step's rate. It does not depend on
`train.num_steps`, so that a resumed run can be made longer."""

NAMED_RATE = 1e-6
"""Megatron's learning rate, which never takes effect: the trainer sets each step's. A checkpoint identifies its groups
of parameters by it. If it followed `optimizer.learning_rate`, a run could not resume with another rate."""


def student_policy(config: Config) -> dict[str, Any]:
    """NeMo-RL's PolicyConfig of the student, generation included."""
    policy = _policy(config, config.model.path, config.nemo.student, config.data.max_prompt_tokens)
    if config.lora.rank:
        policy["megatron_cfg"]["peft"] = _adapters(config.lora)
    return _merged(policy | {"generation": _generation(config)}, config.nemo.policy)


def teacher_policy(config: Config) -> dict[str, Any]:
    """NeMo-RL's PolicyConfig of an external teacher."""
    assert config.teacher.path is not None
    policy = _policy(config, config.teacher.path, config.nemo.teacher, teacher_prompt(config)[1])
    merged = _merged(policy, {key: value for key, value in config.nemo.policy.items() if key != "generation"})
    # With a generation block it would sample, and with the student's checkpoint it would be the student.
    return {key: value for key, value in merged.items() if key not in ("generation", "pretrained_checkpoint")}


def _policy(config: Config, path: str, parallel: ParallelConfig, prompt_tokens: int) -> dict[str, Any]:
    nemo, optimizer = config.nemo, config.optimizer
    model = resolve_model_path(path)
    budget = {
        "train_mb_tokens": config.train.tokens_per_micro_batch,
        "logprob_mb_tokens": scoring_tokens(nemo, config.train.tokens_per_micro_batch),
        "sequence_length_round": sequence_multiple(parallel),
    }
    return {
        "model_name": model,
        "tokenizer": {"name": resolve_model_path(config.model.path), "chat_template_kwargs": None},
        "precision": config.model.dtype,
        "train_global_batch_size": config.rollout.num_prompts_per_step * config.rollout.num_rollouts_per_prompt,
        "train_micro_batch_size": 1,
        "logprob_batch_size": 1,
        "logprob_chunk_size": None,
        "max_total_sequence_length": prompt_tokens + config.rollout.max_response_tokens,
        "make_sequence_length_divisible_by": sequence_multiple(parallel),
        "max_grad_norm": optimizer.max_grad_norm,
        "offload_optimizer_for_logprob": nemo.offload_optimizer,
        "sequence_packing": {
            "enabled": nemo.batching == "packed",
            "algorithm": "modified_first_fit_decreasing",
            **budget,
        },
        "dynamic_batching": {"enabled": nemo.batching == "dynamic", **budget},
        **(
            _dtensor(config, parallel)
            if nemo.backend == "dtensor"
            else {"megatron_cfg": _megatron(config, parallel), "dtensor_cfg": {"enabled": False}}
        ),
    }


def _dtensor(config: Config, parallel: ParallelConfig) -> dict[str, Any]:
    optimizer = config.optimizer
    return {
        "megatron_cfg": {"enabled": False},
        "dtensor_cfg": {
            "enabled": True,
            "_v2": True,
            "cpu_offload": False,
            "sequence_parallel": parallel.sequence,
            "activation_checkpointing": config.nemo.activation_checkpointing,
            "tensor_parallel_size": parallel.tensor,
            "context_parallel_size": parallel.context,
            "custom_parallel_plan": None,
        },
        "optimizer": {
            "name": "torch.optim.AdamW",
            "kwargs": {
                "lr": optimizer.learning_rate,
                "weight_decay": optimizer.weight_decay,
                "betas": list(optimizer.betas),
                "eps": 1e-8,
                "foreach": False,  # neither works on DTensors
                "fused": False,
            },
        },
    }


def _megatron(config: Config, parallel: ParallelConfig) -> dict[str, Any]:
    optimizer = config.optimizer
    bf16 = config.model.dtype == "bfloat16"
    return {
        "enabled": True,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": parallel.sequence,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "pipeline_dtype": config.model.dtype,
        "activation_checkpointing": config.nemo.activation_checkpointing,
        "empty_unused_memory_level": 1,  # training and vLLM take turns on the same GPUs
        "force_reconvert_from_hf": False,
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "gradient_accumulation_fusion": False,
        "use_fused_weighted_squared_relu": False,  # of models with that activation; none here has it
        "defer_fp32_logits": True,  # the loss widens them chunk by chunk
        "freeze_moe_router": True,
        "moe_router_dtype": "fp64",
        "moe_router_load_balancing_type": "none",
        "moe_router_bias_update_rate": 0.0,
        "moe_permute_fusion": True,
        "moe_enable_deepep": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_overlap": False,
        "moe_per_layer_logging": False,
        "train_iters": ITERATIONS,
        "optimizer": {
            "optimizer": "adam",
            "lr": NAMED_RATE,
            "min_lr": 0.0,
            "weight_decay": optimizer.weight_decay,
            "bf16": bf16,
            "fp16": False,
            "params_dtype": "float32",
            "adam_beta1": optimizer.betas[0],
            "adam_beta2": optimizer.betas[1],
            "adam_eps": 1e-8,
            "sgd_momentum": 0.9,
            "use_distributed_optimizer": True,
            "use_precision_aware_optimizer": bf16,
            "optimizer_cpu_offload": False,
            "optimizer_offload_fraction": 0.0,
            "clip_grad": optimizer.max_grad_norm,
        },
        "scheduler": {
            "start_weight_decay": optimizer.weight_decay,
            "end_weight_decay": optimizer.weight_decay,
            "weight_decay_incr_style": "constant",
            "lr_decay_style": "constant",
            "lr_decay_iters": ITERATIONS,
            "lr_warmup_iters": 0,
            "lr_warmup_init": 0.0,
        },
        "distributed_data_parallel_config": {
            "grad_reduce_in_fp32": True,
            "overlap_grad_reduce": True,
            # If on, ranks gather updated parameters in their next training forward, which comes after the refit. vLLM
            # would get weights of which all but one rank's share are one update old (NeMo-RL before its #4086).
            "overlap_param_gather": False,
            "use_custom_fsdp": False,
            "data_parallel_sharding_strategy": "optim_grads_params",
        },
        "fp8_cfg": {"enabled": False},
    }


def _adapters(lora: LoraConfig) -> dict[str, Any]:
    """NeMo-RL's block of Megatron-Bridge's LoRA."""
    return {
        "enabled": True,
        "target_modules": list(MEGATRON_LAYERS if lora.targets == "all" else lora.targets),
        "exclude_modules": [],
        "dim": lora.rank,
        "alpha": lora.alpha,
        "dropout": lora.dropout,
        "dropout_position": "pre",  # on the adapter's input
        "lora_A_init_method": "xavier",
        "lora_B_init_method": "zero",
        "a2a_experimental": False,
        "lora_dtype": None,
    }


def _generation(config: Config) -> dict[str, Any]:
    nemo, generation = config.nemo, config.nemo.generation
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    nodes = generation.gpus // nemo.gpus_per_node if nemo.num_nodes > 1 else 1
    return {
        "backend": "vllm",
        "model_name": resolve_model_path(config.model.path),
        "max_new_tokens": config.rollout.max_response_tokens,
        "temperature": 1.0,  # NeMo-RL divides training logits by it; each call of the sampler sets its own
        "top_p": 1.0,
        "top_k": None,
        "val_temperature": config.eval.temperature,  # required by NeMo-RL's main branch, not used by this engine
        "val_top_p": config.eval.top_p,
        "val_top_k": None,
        "stop_token_ids": None,
        "stop_strings": None,
        "vllm_cfg": {
            "async_engine": False,
            "precision": config.model.dtype,
            "kv_cache_dtype": "auto",
            "tensor_parallel_size": generation.tensor,
            "pipeline_parallel_size": 1,
            "expert_parallel_size": 1,
            "gpu_memory_utilization": generation.gpu_memory_utilization,
            "max_model_len": longest,
            "enforce_eager": False,
            "use_deep_gemm": False,
            "logprobs_mode": "processed_logprobs",  # of the sampled distribution; the only mode of NeMo-RL v0.7.0
            "num_first_layers_in_bf16": 0,
            "num_last_layers_in_bf16": 0,
            "distributed_executor_backend": None,
            "enable_prefix_caching": True,
            "use_tqdm": False,
        },
        "vllm_kwargs": {"hf_overrides": {}},
        "colocated": {
            "enabled": generation.gpus == 0,
            "resources": {
                "num_nodes": nodes if generation.gpus else None,
                "gpus_per_node": generation.gpus // nodes if generation.gpus else None,
            },
        },
    }


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        own = merged.get(key)
        merged[key] = _merged(own, value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return merged
