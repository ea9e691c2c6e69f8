"""A Hugging Face Qwen3 checkpoint in a real Megatron-Core `GPTModel`, cut over any TP and PP. Used by tests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def start_megatron(tp: int = 1, pp: int = 1, cp: int = 1) -> None:
    """Megatron's process groups; those of an earlier call are given up."""
    from megatron.core import parallel_state

    from tests.integration.on_cpu import redirect_megatron_generator

    if not torch.distributed.is_initialized():
        import os

        from tests.integration.nemo.ranks import _ports

        os.environ["MASTER_PORT"] = str(_ports.pop())
        torch.distributed.init_process_group("gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
    )
    redirect_megatron_generator()


def build(
    path: Path,
    *,
    attention: bool = True,
    sequence_parallel: bool = False,
    padded_vocab: int | None = None,
    tied: bool = False,
    **overrides: Any,
) -> Any:
    """The checkpoint as a `GPTModel` on the ranks of `start_megatron`.

    Args:
        attention: False leaves attention out: what is left works on packed sequences, whose attention needs CUDA.
        padded_vocab: columns to add, with weights that would show if they counted.
        tied: one weight for embedding and output layer, if the checkpoint has but one.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.transformer_config import TransformerConfig
    from safetensors.torch import load_file
    from transformers import AutoConfig

    if sequence_parallel:
        _allow_torch_norm()
    hf = AutoConfig.from_pretrained(path)
    config = TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ps.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=ps.get_pipeline_model_parallel_world_size(),
        context_parallel_size=ps.get_context_parallel_world_size() if attention else 1,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **overrides,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    if not attention:
        spec.submodules.input_layernorm = spec.submodules.self_attention = IdentityOp
        spec.submodules.self_attn_bda = IdentityFuncOp
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab or hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        position_embedding_type="rope" if attention else "none",
        rotary_base=int(hf.rope_parameters["rope_theta"]),
        share_embeddings_and_output_weights=tied and hf.tie_word_embeddings,
        parallel_output=True,
    )
    source = load_file(path / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_weight(name, source, hf, ps, padded_vocab))
    return model


def _allow_torch_norm() -> None:
    """Megatron refuses torch's norm under sequence parallelism because of its gradient; its forward is right."""
    from megatron.core.transformer import torch_norm

    torch_norm.WrappedTorchNorm.__new__ = lambda _, config, hidden_size, eps=1e-6, **__: torch.nn.RMSNorm(
        hidden_size, eps=eps
    )


def _weight(name: str, source: dict[str, Tensor], hf: Any, ps: Any, padded_vocab: int | None) -> Tensor:
    """This rank's part of a parameter, by Megatron's name."""
    rank, size = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()

    def columns(weight: Tensor, dim: int = 0) -> Tensor:
        return weight.chunk(size, dim)[rank]

    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        head = name == "output_layer.weight" and "lm_head.weight" in source
        weight = source["lm_head.weight" if head else "model.embed_tokens.weight"]
        if padded_vocab:
            weight = torch.cat([weight, weight[: padded_vocab - len(weight)] * 3])
        return columns(weight)
    if name == "decoder.final_layernorm.weight":
        return source["model.norm.weight"]
    _, _, layer, *rest = name.split(".")
    per_stage = hf.num_hidden_layers // ps.get_pipeline_model_parallel_world_size()
    prefix = f"model.layers.{int(layer) + ps.get_pipeline_model_parallel_rank() * per_stage}"
    match ".".join(rest):
        case "input_layernorm.weight":
            return source[f"{prefix}.input_layernorm.weight"]
        case "pre_mlp_layernorm.weight":
            return source[f"{prefix}.post_attention_layernorm.weight"]
        case "self_attention.q_layernorm.weight":
            return source[f"{prefix}.self_attn.q_norm.weight"]
        case "self_attention.k_layernorm.weight":
            return source[f"{prefix}.self_attn.k_norm.weight"]
        case "self_attention.linear_proj.weight":
            return columns(source[f"{prefix}.self_attn.o_proj.weight"], dim=1)
        case "mlp.linear_fc2.weight":
            return columns(source[f"{prefix}.mlp.down_proj.weight"], dim=1)
        case "mlp.linear_fc1.weight":
            return torch.cat([columns(source[f"{prefix}.mlp.{part}_proj.weight"]) for part in ("gate", "up")])
        case "self_attention.linear_qkv.weight":  # by query group: its queries, its key, its value
            groups = hf.num_key_value_heads
            parts = [source[f"{prefix}.self_attn.{part}_proj.weight"].unflatten(0, (groups, -1)) for part in "qkv"]
            return columns(torch.cat(parts, dim=1).flatten(0, 1))
    raise KeyError(name)
