"""Checks of models and environment before a GPU is reserved. `config.cluster` makes those that need no model."""

from __future__ import annotations

import os
from typing import Any

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.checks import teacher_prompt
from mopd_nemo.config.cluster import ParallelConfig
from mopd_nemo.engines.models import check_is_whole, check_positions, check_vocabularies, load_model_config
from mopd_nemo.engines.nemo import has_nemo_rl

DTENSOR_TENSOR_MODELS = ("llama",)
"""Model types whose training under DTensor's tensor parallelism equals training in one process."""


def check_surroundings(backend: str) -> None:
    """NeMo-RL is importable, and the environment variables of its policy are set.

    Raises:
        UserError: naming what is missing.
    """
    if not has_nemo_rl():
        raise UserError(
            "engine=nemo needs NeMo-RL, which is not on a package index: run inside its container, or put a checkout "
            "on PYTHONPATH (docs/nemo.md)"
        )
    if backend == "megatron" and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        raise UserError(
            "engine=nemo: NeMo-RL's Megatron policy needs the environment variable TORCH_CUDA_ARCH_LIST, which its "
            "container sets. Outside it, for H100: export TORCH_CUDA_ARCH_LIST=9.0"
        )


def check_models(config: Config) -> int:
    """Student and external teacher fit their parallel sizes, their budgets and each other. Reads no weights.

    Returns:
        The size of the vocabulary.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    check_is_whole(config.model.path, "model.path", "engine=nemo")
    student = load_model_config(config.model.path, key="model.path")
    response = config.rollout.max_response_tokens
    _check_parallel_sizes(student, "nemo.student", config.nemo.student, config.nemo.backend)
    _check_tensor_training(student, config)
    check_positions(student, "model.path", "data.max_prompt_tokens", config.data.max_prompt_tokens, response)
    if student.num_attention_heads % config.nemo.generation.tensor:
        raise UserError(
            f"nemo.generation.tensor={config.nemo.generation.tensor} does not divide the "
            f"{student.num_attention_heads} attention heads of model.path={config.model.path}"
        )
    teacher, key = student, "model.path, as its own teacher,"
    if config.teacher.path is not None:
        check_is_whole(config.teacher.path, "teacher.path", "engine=nemo")
        check_vocabularies(config.model.path, config.teacher.path)
        teacher, key = load_model_config(config.teacher.path, key="teacher.path"), "teacher.path"
        _check_parallel_sizes(teacher, "nemo.teacher", config.nemo.teacher, config.nemo.backend)
    if not config.has_teacher("server"):
        check_positions(teacher, key, *teacher_prompt(config), response)
    return student.vocab_size


def _check_parallel_sizes(model: Any, key: str, parallel: ParallelConfig, backend: str) -> None:
    padded = backend == "megatron"
    for what, count, size, name in (
        ("attention heads", model.num_attention_heads, parallel.tensor, "tensor"),
        ("key-value heads", model.num_key_value_heads, parallel.tensor, "tensor"),
        ("layers", model.num_hidden_layers, parallel.pipeline, "pipeline"),
        ("tokens of the vocabulary", 0 if padded else model.vocab_size, parallel.tensor, "tensor"),
    ):
        if count % size:
            raise UserError(f"{key}.{name}={size} does not divide the model's {count} {what}: choose a divisor of it")


def _check_tensor_training(student: Any, config: Config) -> None:
    """Automodel does not sum the gradients of norms inside sharded heads, so Qwen3's ranks drift apart."""
    tensor = config.nemo.student.tensor
    if config.nemo.backend == "dtensor" and tensor > 1 and student.model_type not in DTENSOR_TENSOR_MODELS:
        raise UserError(
            f"nemo.student.tensor={tensor} with nemo.backend=dtensor trains {', '.join(DTENSOR_TENSOR_MODELS)} models "
            f"right, not model.path={config.model.path}, a {student.model_type}: set nemo.student.tensor=1 or "
            "nemo.backend=megatron (docs/nemo.md)"
        )
