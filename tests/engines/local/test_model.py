"""Alignment: the hidden states that the losses see belong to the sampled tokens, and to no neighbour."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from bench.peak import Peak
from mopd_nemo.config import UserError
from mopd_nemo.engines.local.model import LanguageModel, load_model, resolve_device
from mopd_nemo.engines.models import check_vocabularies, load_tokenizer
from tests.conftest import make_random_model

CPU = torch.device("cpu")
PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5, 4, 3), (11,)]
RESPONSES = [(20, 21, 22, 23), (30,), (40, 41, 42, 43, 44, 45, 46)]


@pytest.fixture(scope="module")
def model(random_model: Path) -> LanguageModel:
    return load_model(str(random_model), key="model.path", dtype=torch.float32, weights=torch.float32, device=CPU)


def naive_logprobs(module: torch.nn.Module, prompt: tuple[int, ...], response: tuple[int, ...]) -> list[float]:
    """One forward pass per token, nothing batched and nothing sliced."""
    logprobs = []
    for t, token in enumerate(response):
        logits = module(input_ids=torch.tensor([[*prompt, *response[:t]]])).logits[0, -1]
        logprobs.append(logits.log_softmax(-1)[token].item())
    return logprobs


@torch.no_grad()
def test_response_rows_are_those_that_predict_the_response(model: LanguageModel) -> None:
    hidden_TH = model.response_hidden_TH(PROMPTS, RESPONSES)
    tokens_T = torch.tensor([token for response in RESPONSES for token in response])
    got_T = model.head(hidden_TH).log_softmax(-1).gather(-1, tokens_T[:, None])[:, 0]
    expected = [x for p, r in zip(PROMPTS, RESPONSES, strict=True) for x in naive_logprobs(model.module, p, r)]
    torch.testing.assert_close(got_T, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert (got_T[1:] - torch.tensor(expected)[:-1]).abs().median() > 0.1, "a shift by one would show"


def test_vocabularies_must_be_equal(random_model: Path, tmp_path: Path) -> None:
    check_vocabularies(str(random_model), str(random_model))
    other = make_random_model(tmp_path, seed=1)
    tokenizer = load_tokenizer(str(other), key="model.path")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=r"teacher.path=.*tokenizer differs"):
        check_vocabularies(str(random_model), str(other))


def test_model_with_capped_logits_is_refused(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(random_model)
    plain = loaded.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = plain(*args, **kwargs)
        output.logits = 3.0 * torch.tanh(output.logits / 3.0)
        return output

    loaded.forward = capped
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded)
    with pytest.raises(UserError, match="soft-capping"):
        load_model(str(random_model), key="model.path", dtype=torch.float32, weights=torch.float32, device=CPU)


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.path=.*nothing-here"):
        load_model(
            str(tmp_path / "nothing-here"),
            key="teacher.path",
            dtype=torch.float32,
            weights=torch.float32,
            device=CPU,
        )


def test_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="not a device name"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="CUDA devices"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trees", [True, False])
def test_layers_computed_again_give_the_same_gradients_in_less_memory(
    tmp_path: Path, dtype: torch.dtype, trees: bool
) -> None:
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    prompts, responses = [tuple(range(40))] * 3, [tuple(range(n, n + 30)) for n in range(3)]
    gradients, hidden, peaks = [], [], []
    for recompute in (False, True):
        model = load_model(
            str(tmp_path), key="model.path", dtype=dtype, weights=torch.float32, device=CPU,
            recompute=recompute,
        )  # fmt: skip
        model.reads_trees = trees
        with Peak("cpu") as peak:
            with model.computing():
                hidden_TH = model.response_hidden_TH(prompts, responses)
            hidden_TH.float().pow(2).sum().backward()
        hidden.append(hidden_TH.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters().items() if p.grad is not None})
        peaks.append(peak.bytes)
        assert not any("forward" in vars(layer) for layer in model.module.base_model.layers)
    assert torch.equal(*hidden)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name
    assert peaks[1] < 0.5 * peaks[0]


def test_a_model_whose_layers_are_not_found_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"train.activation_checkpointing=true: GPT2LMHeadModel .* set it false"):
        load_model(
            str(tmp_path), key="model.path", dtype=torch.float32, weights=torch.float32, device=CPU,
            recompute=True,
        )  # fmt: skip
