"""The cost model's arithmetic against torch's own counter, against figures worked out elsewhere, and by hand."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bench.cost import (
    BF16,
    FP32,
    Lengths,
    Machine,
    Reading,
    attention_flops,
    data_seconds,
    decode_seconds,
    follow_seconds,
    forward_flops,
    guest_seconds,
    handover_seconds,
    head_flops,
    linear_flops,
    refit_seconds,
    swap_seconds,
    tensor_seconds,
    update_flops,
)
from mopd_nemo.config.cluster import ParallelConfig
from mopd_nemo.engines.architecture import KNOWN, Architecture, from_config
from tests.conftest import SIZES

B, S = 2, 12


def make(family: str, **more: int) -> tuple[torch.nn.Module, Architecture]:
    """A model whose every product the counter sees, and its sizes."""
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    options = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if more else {})
    sizes = from_config(config.to_dict())
    assert sizes is not None
    return getattr(transformers, f"{family}ForCausalLM")._from_config(config, **options), sizes


def square(model: Architecture, reading: Reading) -> float:
    """FLOP of attention that computes every pair and masks some, as the models' own code does."""
    pairs = reading.tokens * (reading.cached + reading.tokens)
    return attention_flops(model, reading) * pairs / reading.pairs


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Qwen3", {}),
        ("Llama", {}),
        ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 16, "num_experts_per_tok": 8}),
    ],
)
@pytest.mark.parametrize("head_rows", [S, 5])
def test_forward_is_what_torch_counts(family: str, more: dict[str, int], head_rows: int) -> None:
    model, sizes = make(family, **more)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(B, S, dtype=torch.long), use_cache=False, logits_to_keep=head_rows)
    read = Reading(B, S, head_rows)
    assert counter.get_total_flops() == linear_flops(sizes, read) + square(sizes, read) + head_flops(sizes, read)


def test_reading_after_a_cache_is_what_torch_counts() -> None:
    model, sizes = make("Qwen3")
    ids_BS = torch.zeros(B, S, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids_BS[:, :7], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids_BS[:, 7:], past_key_values=cache, use_cache=True)
    read = Reading(B, S - 7, S - 7, cached=7)
    assert counter.get_total_flops() == linear_flops(sizes, read) + square(sizes, read) + head_flops(sizes, read)


def test_update_is_what_torch_counts() -> None:
    model, sizes = make("Qwen3")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(B, S, dtype=torch.long), use_cache=False).logits.sum().backward()
    read = Reading(B, S, S)
    rest = square(sizes, read) - attention_flops(sizes, read)
    assert counter.get_total_flops() == update_flops(sizes, [read], recompute=False) + 3 * rest
    assert update_flops(sizes, [read], recompute=True) == pytest.approx(
        4 * forward_flops(sizes, [read]) - head_flops(sizes, read)
    )


def test_pairs_are_those_of_a_causal_mask() -> None:
    mask = torch.ones(5, 5 + 3).tril(3)
    assert Reading(1, 5, cached=3).pairs == mask.sum()


def test_shared_context_has_the_pairs_of_a_whole_row() -> None:
    whole, split = Reading(1, 50), (Reading(1, 30), Reading(1, 20, cached=30))
    assert whole.pairs == sum(part.pairs for part in split)


def test_a_step_of_qwen3_8b_in_petaflop() -> None:
    """256 rollouts, 800 prompt and 3000 response tokens, three peers; worked out separately."""
    model = KNOWN["Qwen/Qwen3-8B"]
    student = [Reading(256, 3800, 3000)]
    assert update_flops(model, student, recompute=False) == pytest.approx(46.68e15, rel=1e-3)
    assert update_flops(model, student, recompute=True) == pytest.approx(61.28e15, rel=1e-3)
    assert forward_flops(model, [Reading(256, 12800, 3000)]) == pytest.approx(58.85e15, rel=1e-3)
    shared = [Reading(128, 9800), Reading(256, 3000, 3000, cached=9800)]
    assert forward_flops(model, shared) == pytest.approx(37.79e15, rel=1e-3)


def test_decoding_reads_weights_for_every_token_and_caches_for_every_sequence() -> None:
    model = KNOWN["Qwen/Qwen3-8B"]
    machine = Machine(bandwidth=1e12, bandwidth_share=0.5, decode_overhead=0.0)
    lengths = Lengths(prompt=100, response=50)
    read_weights = 2 * (model.parameters - model.embedding) / 0.5e12
    caches = 16 * (50 * 100 + 50 * 50 / 2) * 2 * 36 * 8 * 128 * 2 / (4 * 0.5e12)
    found = decode_seconds(model, machine, 16, lengths, longest=64, gpus=4, tensor=1)
    assert found == pytest.approx(64 * read_weights + caches)


def test_decoding_large_batches_is_bound_by_arithmetic() -> None:
    model, lengths = KNOWN["Qwen/Qwen3-8B"], Lengths(prompt=0, response=1)
    machine = Machine(decode_overhead=0.0, bandwidth_share=1e6)
    found = decode_seconds(model, machine, 4096, lengths, longest=1, gpus=8, tensor=1)
    work = forward_flops(model, [Reading(4096, 1, 1)])
    assert found == pytest.approx(work / (8 * machine.flops * machine.mfu_decode), rel=1e-3)


def test_collectives_by_hand() -> None:
    model = KNOWN["Qwen/Qwen3-8B"]
    machine = Machine(nvlink=100.0, network=10.0, link_share=1.0, refit_share=1.0)
    cut = ParallelConfig(tensor=2)
    # 1000 tokens on 8 GPUs of TP 2: 250 on each copy; 4 collectives a layer, half of each sent.
    assert tensor_seconds(model, machine, 1000, 8, cut, passes=1) == pytest.approx(36 * 4 * 250 * 4096 * BF16 / 2 / 100)
    assert tensor_seconds(model, machine, 1000, 8, ParallelConfig(), passes=3) == 0.0
    sent = (FP32 + BF16) * model.parameters / 2 * 3 / 4
    assert data_seconds(model, machine, 8, 8, cut) == pytest.approx(sent / 100)
    sent = (FP32 + BF16) * model.parameters / 2 * 7 / 8
    assert data_seconds(model, machine, 16, 8, cut) == pytest.approx(sent / 10)
    assert refit_seconds(model, machine, cut, False, False) == pytest.approx(BF16 * model.parameters / 2 / 100)


def test_turns_on_the_same_gpus_by_hand() -> None:
    student, teacher = KNOWN["Qwen/Qwen3-4B"], KNOWN["Qwen/Qwen3-14B"]
    machine = Machine(host_link=10.0, pinned_link=20.0, nvlink=100.0, network=50.0, link_share=0.5)
    two, four = ParallelConfig(tensor=2), ParallelConfig(tensor=4)
    shard = student.parameters / 2
    assert handover_seconds(student, machine, 8, two) == pytest.approx((4 * shard + 24 * student.parameters / 8) / 10)
    gathered = 2 * 2 * shard * 3 / 4  # four ranks share the optimiser
    assert swap_seconds(student, machine, 8, 8, two) == pytest.approx(4 * shard / 4 / 20 + gathered / 50)
    assert swap_seconds(student, machine, 8, 4, two) == pytest.approx(4 * shard / 4 / 20 + gathered / 25)
    assert guest_seconds(student, teacher, machine, two, four) == pytest.approx(
        4 * (shard + teacher.parameters / 4) / 10
    )
    assert follow_seconds(student, machine, 8) == pytest.approx(2 * 4 * shard / 4 / 20)
