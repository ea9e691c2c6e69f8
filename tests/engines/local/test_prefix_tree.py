"""A tree of sequences gives the hidden states and gradients that each sequence alone gives."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from bench.peak import Peak
from mopd_nemo.engines.local import model as local_model
from mopd_nemo.engines.local import prefix_tree
from mopd_nemo.engines.local.model import LanguageModel, load_model
from mopd_nemo.engines.local.prefix_tree import MIN_SHARED, Families, build_tree, common_length

CPU = torch.device("cpu")
Ids = list[int]


def double(path: Path) -> LanguageModel:
    return LanguageModel(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64), torch.float64)


def group_of_rows(seed: int) -> list[Ids]:
    """Contexts of a group that share peers, each with a response; equal rows and rows within rows."""
    rng = random.Random(seed)

    def some(length: int) -> Ids:
        return [rng.randrange(5, 60) for _ in range(length)]

    question, (one, two, three, wrong) = some(20), (some(25) for _ in range(4))
    contexts = [question + one + two + wrong] * 4 + [question + one + three + wrong, question + two + three + wrong]
    rows = [context + some(rng.randrange(1, 60)) for context in contexts]
    return [*rows, rows[0], rows[1][:50], rows[2][:-3], some(1)]


def cut(sequences: list[Ids]) -> tuple[list[Ids], list[Ids]]:
    """Prompts and responses, cut at different places; a last token follows, which is not read."""
    lengths = [1 + 7 * number % len(sequence) for number, sequence in enumerate(sequences)]
    return (
        [s[:length] for s, length in zip(sequences, lengths, strict=True)],
        [[*s[length:], 0] for s, length in zip(sequences, lengths, strict=True)],
    )


def alone(model: LanguageModel, prompts: list[Ids], responses: list[Ids]) -> Tensor:
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response[:-1]]])
        rows.append(model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
    return torch.cat(rows)


@pytest.mark.parametrize(("seed", "block"), [(0, 128), (1, 128), (2, 16), (3, 1)])
def test_hidden_states_and_gradients_are_those_of_each_sequence_alone(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, seed: int, block: int
) -> None:
    monkeypatch.setattr(prefix_tree, "BLOCK", block)
    prompts, responses = cut(group_of_rows(seed))
    weights_T1 = torch.rand(sum(map(len, responses)), 1, dtype=torch.float64)
    found, gradients = [], []
    for run in (alone, LanguageModel.hidden_by_tree_TH):
        model = double(random_model)
        hidden_TH = run(model, prompts, responses)
        (hidden_TH.pow(3) * weights_T1).sum().backward()
        found.append(hidden_TH)
        gradients.append({name: p.grad for name, p in model.named_parameters().items() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-10)
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, expected in gradients[0].items():  # the model's norms compute in float32, whatever its type
        assert (gradients[1][name] - expected).abs().max() < 1e-6 * expected.abs().max(), name


def plain_varlen(query, key, value, query_ends, key_ends, longest, width, scale):
    """What the flash kernel computes, segment by segment: the last query sees all keys of its segment."""
    found = []
    spans = zip(query_ends.tolist(), query_ends[1:].tolist(), key_ends.tolist(), key_ends[1:].tolist(), strict=False)
    for first, last, start, stop in spans:
        asked, keys, values = (
            x.repeat_interleave(query.shape[1] // x.shape[1], dim=1).transpose(0, 1)
            for x in (query[first:last], key[start:stop], value[start:stop])
        )
        hidden = torch.ones(last - first, stop - start, dtype=torch.bool).triu(stop - start - last + first + 1)
        scores = (asked @ keys.mT * scale).masked_fill(hidden, float("-inf"))
        found.append((scores.softmax(-1) @ values).transpose(0, 1))
        assert last - first <= longest and stop - start <= width
    return torch.cat(found)


def test_segments_of_the_flash_kernel_give_the_same(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own arithmetic needs a GPU: here another function takes the same segments."""
    monkeypatch.setattr(prefix_tree, "flash", lambda: plain_varlen)
    prompts, responses = cut(group_of_rows(4))
    found, gradients = [], []
    for flash in (False, True):
        model = double(random_model)
        model.flash = flash
        hidden_TH = model.hidden_by_tree_TH(prompts, responses)
        hidden_TH.pow(3).sum().backward()
        found.append(hidden_TH)
        gradients.append({name: p.grad for name, p in model.named_parameters().items() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-10)
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).abs().max() < 1e-6 * expected.abs().max(), name


def test_a_failing_kernel_leaves_trees_to_blocks(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_model, "_may_flash", lambda _: True)  # flash attention has no CPU kernel
    with caplog.at_level("INFO"):
        model = double(random_model)
    assert model.reads_trees and not model.flash
    assert "reads sequences as trees, without the flash kernel" in caplog.text


def test_autocast_casts_keys_once_for_all_blocks(random_model: Path) -> None:
    """What an update keeps grows with the length of a segment, not with its square."""
    model = load_model(str(random_model), key="model.path", dtype=torch.bfloat16, weights=torch.float32, device=CPU)
    grown = []
    for length in (512, 1024):
        with Peak("cpu") as peak, model.computing():
            model.hidden_by_tree_TH([[5]], [[6 + i % 50 for i in range(length)]])
        grown.append(peak.bytes)
    assert grown[1] < 2.1 * grown[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3 * MIN_SHARED), min_size=1, max_size=8))
def test_every_token_is_in_its_place(sequences: list[Ids]) -> None:
    tree = build_tree(sequences, CPU)
    for sequence, places in zip(sequences, tree.places, strict=True):
        assert tree.ids_S[places].tolist() == sequence
        assert tree.positions_S[places].tolist() == list(range(len(sequence)))
    plan = tree.attention
    assert isinstance(plan, Families)
    assert plan.queries_Q[plan.outputs_S].tolist() == list(range(len(tree.ids_S)))


@torch.no_grad()
def test_the_last_layer_computes_wanted_positions_alone(random_model: Path) -> None:
    model, seen = double(random_model), []
    for layer in model.module.base_model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    context = list(range(5, 45))
    model.hidden_by_tree_TH([context] * 3, [[7] * 20, [8] * 20, [7] * 20])
    assert set(seen[:-1]) == {40 + 2 * 19}
    assert seen[-1] == 1 + 2 * 19  # the context's last token, which predicts the first ones, and the responses


def test_what_is_common_is_computed_once() -> None:
    context = list(range(100, 180))
    tree = build_tree([context + [1] * 30, context + [2] * 40, context + [1] * 30], CPU)
    assert len(tree.ids_S) == 80 + 30 + 40
    short = list(range(MIN_SHARED - 1))
    assert len(build_tree([[*short, 100], [*short, 101]], CPU).ids_S) == 2 * MIN_SHARED


def test_no_segment_is_padded_to_more_than_twice_its_length() -> None:
    context = list(range(100, 180))
    sequences = [context + [n] * length for n, length in enumerate((1000, 900, 30, 20, 3))]
    tree = build_tree(sequences, CPU)
    plan = tree.attention
    assert isinstance(plan, Families)
    assert [(family.count, family.longest) for family in plan.families] == [(1, 80), (2, 1000), (2, 30), (1, 3)]


def test_common_length() -> None:
    assert [common_length(*pair) for pair in (([1, 2], [1, 2, 3]), ([1, 2], [1, 3]), ([1], [2]), ([], [1]))] == [
        2, 1, 0, 0,
    ]  # fmt: skip


def test_architectures_are_tried_and_windows_read_off(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert LanguageModel(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), torch.float32).reads_trees
    windowed = LanguageModel(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=64)), torch.float32)
    assert not windowed.reads_trees
    eager = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="eager"))
    assert not LanguageModel(eager, torch.float32).reads_trees


def test_a_model_that_ignores_trees_is_found_out(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = AutoModelForCausalLM.from_pretrained(random_model)
    forward = module.base_model.forward
    monkeypatch.setattr(module.base_model, "forward", lambda tree=None, **kwargs: forward(**kwargs))
    model = LanguageModel(module, torch.float32)
    assert not model.reads_trees
    assert module.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_response_rows_are_the_same_without_trees(random_model: Path, dtype: torch.dtype) -> None:
    model = load_model(str(random_model), key="model.path", dtype=dtype, weights=torch.float32, device=CPU)
    prompts = [(5, 6, 7) * 10, (5, 6, 7) * 10, (9, 8)]
    responses = [(20, 21, 22), (30,), (40, 41)]
    assert model.reads_trees
    with model.computing():
        tree_TH = model.response_hidden_TH(prompts, responses)
        model.reads_trees = False
        padded_TH = model.response_hidden_TH(prompts, responses)
    assert len(tree_TH) == 6
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(tree_TH, padded_TH, atol=tolerance, rtol=tolerance)
