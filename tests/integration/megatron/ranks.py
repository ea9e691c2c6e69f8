"""What each process of test_gpt_model.py does: train a real GPTModel on the loss, whole and cut, and compare."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.integration import on_cpu

on_cpu.redirect_cuda()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from mopd_nemo.losses.logits import Head, Logits, Tokens  # noqa: E402
from mopd_nemo.losses.objectives import Divergence  # noqa: E402
from mopd_nemo.losses.token_loss import token_loss  # noqa: E402
from mopd_nemo.losses.vocab import Vocab  # noqa: E402

LAYERS, HIDDEN, HEADS, SEQUENCE = 4, 32, 4, 16
VOCAB, PADDED_VOCAB = 121, 128
SEQUENCES, MICRO_BATCH, STEPS = 4, 2, 3
NUM_MICRO_BATCHES = SEQUENCES // MICRO_BATCH

OBJECTIVES = [Divergence("jsd", k=10), Divergence("reverse_kl", support="full")]


def compare(layouts: list[tuple[int, int]], objectives: list[Divergence]) -> None:
    """Each (tensor, pipeline) layout against the whole model, for each objective."""
    for objective in objectives:
        whole = train(1, 1, objective)
        for tensor, pipeline in layouts:
            cut = train(tensor, pipeline, objective)
            for step, loss in enumerate(cut["losses"]):
                if loss is not None:  # None: not the last pipeline stage
                    torch.testing.assert_close(loss, whole["losses"][step], rtol=1e-4, atol=1e-6)
            for what in ("gradients", "weights"):
                for name, value in cut[what].items():
                    expected = share(name, whole[what][name], cut["place"])
                    torch.testing.assert_close(value, expected, rtol=1e-3, atol=5e-6, msg=f"{what} of {name} differ")
        assert whole["losses"][-1] < whole["losses"][0]


def train(tensor: int, pipeline: int, objective: Divergence) -> dict[str, Any]:
    """A few optimiser steps in one layout: losses, gradients of the first step, weights after the last."""
    parallel_state.initialize_model_parallel(tensor, pipeline)
    try:
        on_cpu.redirect_megatron_generator()
        model_parallel_cuda_manual_seed(0)
        config = config_of(tensor, pipeline)
        model = model_of(config)
        place = (parallel_state.get_tensor_model_parallel_rank(), tensor)
        first_layer = parallel_state.get_pipeline_model_parallel_rank() * LAYERS // pipeline
        load(model, place, first_layer)
        config.finalize_model_grads_func = finalize_model_grads
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        optimizer = get_megatron_optimizer(
            # The large epsilon keeps Adam smooth where a gradient is all rounding.
            OptimizerConfig(
                optimizer="adam", lr=1e-2, adam_eps=1e-3, weight_decay=0.01, params_dtype=torch.float32, clip_grad=1.0
            ),
            [wrapped],
        )
        losses, gradients = [], {}
        for step in range(STEPS):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            found = forward_backward(wrapped, objective, place)
            losses.append(sum(x["loss"] for x in found) if found else None)
            if step == 0:
                gradients = {global_name(n, first_layer): p.main_grad.clone() for n, p in model.named_parameters()}
            optimizer.step()
        weights = {global_name(n, first_layer): p.detach().clone() for n, p in model.named_parameters()}
        return {"losses": losses, "gradients": gradients, "weights": weights, "place": place}
    finally:
        parallel_state.destroy_model_parallel()


def forward_backward(model: Any, objective: Divergence, place: tuple[int, int]) -> list[dict[str, Any]]:
    """All micro-batches through Megatron's own schedule, with `token_loss` on this rank's columns of the logits."""
    head = share("output_layer.weight", random_of("teacher head", PADDED_VOCAB, HIDDEN), place)
    vocab = Vocab(parallel_state.get_tensor_model_parallel_group(), VOCAB)
    whole = batch()

    def step(batches: Any, model: Any) -> Any:
        data = next(batches)
        output = model(data["input_ids"], torch.arange(SEQUENCE).expand(MICRO_BATCH, -1), None)
        sequence_T, position_T = data["weights"].nonzero(as_tuple=True)
        before = (sequence_T, position_T - 1)  # the row that predicts a token lies one position before it

        def loss(logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
            total = token_loss(
                objective,
                Logits(logits.flatten(0, 1), sequence_T * SEQUENCE + position_T - 1),
                Tokens(data["input_ids"][sequence_T, position_T]),
                Head(data["teacher_hidden"][before], head),
                weights_T=data["weights"][sequence_T, position_T],
                vocab=vocab,
                watch=5,
            ).total
            return total * NUM_MICRO_BATCHES, {"loss": total.item()}  # Megatron averages over micro-batches

        return output, loss

    parts = [{k: v[i : i + MICRO_BATCH] for k, v in whole.items()} for i in range(0, SEQUENCES, MICRO_BATCH)]
    return get_forward_backward_func()(
        forward_step_func=step, data_iterator=iter(parts), model=[model], num_microbatches=NUM_MICRO_BATCHES,
        seq_length=SEQUENCE, micro_batch_size=MICRO_BATCH, forward_only=False,
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    """Four sequences, of which one has no response; each token's weight makes the loss the mean of their means."""
    weights = torch.zeros(SEQUENCES, SEQUENCE)
    for i, (start, stop) in enumerate([(3, 16), (5, 9), (0, 0), (1, 12)]):
        weights[i, start:stop] = 1 / (3 * max(stop - start, 1))
    generator = torch.Generator().manual_seed(5)
    return {
        "input_ids": torch.randint(0, VOCAB, (SEQUENCES, SEQUENCE), generator=generator),
        "weights": weights,
        "teacher_hidden": torch.randn(SEQUENCES, SEQUENCE, HIDDEN, generator=generator),
    }


def config_of(tensor: int, pipeline: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=64, num_attention_heads=HEADS, num_query_groups=2,
        kv_channels=8, qk_layernorm=True, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, use_cpu_initialization=True,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32,
        params_dtype=torch.float32, hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
        bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        apply_rope_fusion=False, persist_layer_norm=False, batch_p2p_comm=False,
    )  # fmt: skip


def model_of(config: TransformerConfig) -> GPTModel:
    return GPTModel(
        config, get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"), vocab_size=PADDED_VOCAB,
        max_sequence_length=SEQUENCE, pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(), position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip


@torch.no_grad()
def load(model: GPTModel, place: tuple[int, int], first_layer: int) -> None:
    """Weights that depend on their global name alone, so that every layout starts from the same model."""
    for name, parameter in model.named_parameters():
        name = global_name(name, first_layer)
        shape = list(parameter.shape)
        if (dim := cut_dim(name)) is not None:
            shape[dim] *= place[1]
        value = random_of(name, *shape)
        parameter.copy_(share(name, 1 + 0.1 * value if parameter.dim() == 1 else value / HIDDEN**0.5, place))


def random_of(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def global_name(name: str, first_layer: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def cut_dim(name: str) -> int | None:
    """The dimension along which Megatron cuts a weight over tensor ranks."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return 1
    columns = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_fc1.weight")
    return 0 if name.endswith(columns) else None


def share(name: str, whole: Tensor, place: tuple[int, int]) -> Tensor:
    """This tensor rank's part. The gated layer holds two matrices, each cut."""
    rank, ranks = place
    dim = cut_dim(name)
    if dim is None or ranks == 1:
        return whole
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, dim)[rank]


def two_processes() -> None:
    dist.barrier()
    compare([(2, 1), (1, 2)], OBJECTIVES)


def four_processes() -> None:
    dist.barrier()
    compare([(2, 2)], OBJECTIVES[:1])
