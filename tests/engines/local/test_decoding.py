"""Decoding gives what the model's own forward gives, for every class with a decoder of its own and for the others."""

from typing import Any

import pytest
import torch
import transformers

from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.llama import LIKE_LLAMA, LlamaDecoder, is_like_llama
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.engines.local.sampler import read_prompts, sample

PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5, 4, 3), (11,), (12, 13)]
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
}


def make(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> LanguageModel:
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3ForCausalLM" else f"{name[:-11]}Config")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    sizes |= {"vocab_size": 100, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0}
    if name != "GPTNeoXForCausalLM":
        sizes |= {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 16}
    torch.manual_seed(0)
    module = getattr(transformers, name)(config_class(**(sizes | settings)))
    for parameter_name, parameter in module.named_parameters():  # norms and biases that could be forgotten
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.3)
    return LanguageModel(module, dtype)


def compare(model: LanguageModel, *, own: bool, tolerance: float, steps: int = 5) -> None:
    """Logits of every step against whole forward passes, while sequences leave in the middle and at the end."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), model.computing():
        logits_BV, decoder = read_prompts(model, PROMPTS, 2, steps)
        assert isinstance(decoder, LlamaDecoder) == own
        sequences = [list(prompt) for prompt in PROMPTS for _ in range(2)]
        for step in range(steps + 1):
            for row, ids in enumerate(sequences):
                expected_V = model.module(input_ids=torch.tensor([ids])).logits[0, -1]
                torch.testing.assert_close(logits_BV[row].float(), expected_V.float(), atol=tolerance, rtol=tolerance)
            if step == steps:
                return
            tokens_B = torch.randint(1, 100, (len(sequences),), generator=generator)
            for ids, token in zip(sequences, tokens_B.tolist(), strict=True):
                ids.append(token)
            if step in (1, 3):
                order = [0, len(sequences) - 1, *range(2, len(sequences) - 2)]
                decoder.keep(torch.tensor(order))
                sequences, tokens_B = [sequences[i] for i in order], tokens_B[order]
            logits_BV = decoder.step(tokens_B)


@pytest.mark.parametrize("name", sorted(LIKE_LLAMA))
def test_own_decoder_is_the_model(name: str) -> None:
    compare(make(name), own=True, tolerance=1e-4)


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_rotations(rope: str) -> None:
    compare(make("LlamaForCausalLM", rope_parameters=ROPES[rope]), own=True, tolerance=1e-4)


def test_biases_and_untied_head() -> None:
    compare(make("Qwen3ForCausalLM", attention_bias=True, tie_word_embeddings=False), own=True, tolerance=1e-4)


def test_narrow_computation_of_wide_weights() -> None:
    compare(make("Qwen3ForCausalLM", torch.bfloat16, initializer_range=0.1), own=True, tolerance=6e-2)


def test_narrow_weights() -> None:
    model = make("Qwen3ForCausalLM", torch.bfloat16, initializer_range=0.1)
    model.module.bfloat16()
    compare(model, own=True, tolerance=6e-2)


def test_the_cache_grows() -> None:
    compare(make("Qwen3ForCausalLM"), own=True, tolerance=1e-4, steps=150)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPTNeoXForCausalLM", {}),
        ("Gemma3ForCausalLM", {"sliding_window": 4}),
        ("MistralForCausalLM", {"sliding_window": 4}),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_other_models_decode_with_their_own_forward(name: str, settings: dict[str, Any]) -> None:
    compare(make(name, **settings), own=False, tolerance=1e-4)


def test_changed_layers_are_not_taken_for_the_original() -> None:
    class Quantised(torch.nn.Linear):
        pass

    model = make("Qwen3ForCausalLM")
    assert is_like_llama(model.module)
    model.module.base_model.layers[1].mlp.up_proj = Quantised(64, 96, bias=False)
    assert not is_like_llama(model.module)


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "GPTNeoXForCausalLM"])
def test_end_token_once_and_its_logprob_at_the_temperature(name: str) -> None:
    """Every recorded log-probability, the end token's too, is that of a whole pass at the sampling temperature."""
    model, ends = make(name), frozenset(range(1, 20))
    found = sample(model, Request(PROMPTS, 4, Sampling(12, temperature=0.7), "s"), eos_ids=ends, batch_size=8)
    assert {len(ids) for ids, _ in found} > {12}
    for number, (ids, logprobs) in enumerate(found):
        prompt = PROMPTS[number // 4]
        assert not ends & set(ids[:-1]) and (ids[-1] in ends or len(ids) == 12) and len(ids) <= 12
        with torch.no_grad():
            logits_TV = model.module(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits_TV.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=1e-4)
