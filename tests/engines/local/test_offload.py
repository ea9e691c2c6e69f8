"""A teacher in host memory: the same numbers to the bit, and no weights on the device outside its pass but its head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.model import LanguageModel, load_model
from mopd_nemo.engines.local.offload import OffloadedModel
from mopd_nemo.losses.objectives import Divergence, Dpo, Objective, ReferenceKL
from mopd_nemo.methods.batch import TrainBatch
from tests.conftest import make_random_model
from tests.engines.local.test_learner import TEACHER_PROMPTS, contrasting, make_batch, make_rows

Make = Callable[..., LocalEngine]
CPU = "model.device=cpu"
"""There an average on the host is computed by the same program as one on the device, so bits can be compared."""
DIVERGENCE = Divergence("jsd", k=20)
PROMPTS, RESPONSES = [(5, 6, 7), (9, 8, 7, 6, 5), (11,)], [(20, 21, 22, 23), (30, 31), (40, 41, 42, 43, 44)]


def steps(engine: LocalEngine, number: int, *objectives: Objective) -> list[dict[str, float]]:
    """What a few whole steps with a large rate say."""
    found = []
    for _ in range(number):
        batch = made(engine, *objectives)
        targets, scored = engine.score(batch)
        signal = [s.teacher.sum() for s in engine.token_signal(batch, targets, 1) if s is not None]
        found.append({**engine.update(batch, targets, 1e-2), **scored, "signal": float(sum(signal))})
        engine.update_teacher()
    return found


def made(engine: LocalEngine, *objectives: Objective) -> TrainBatch:
    rows = make_rows(engine, TEACHER_PROMPTS)
    return make_batch(contrasting(rows) if objectives[0].reads_contrast else rows, *objectives)


def assert_same(engines: list[LocalEngine]) -> None:
    first, second = engines
    for a, b in ((first.student, second.student), (first.teacher.model, second.teacher.model)):
        if a is None or b is None:
            continue
        assert a.named_parameters().keys() == b.named_parameters().keys()
        for name, weights in a.named_parameters().items():
            assert torch.equal(weights, b.named_parameters()[name]), name


def on_device(model: LanguageModel | None) -> int:
    """Bytes of the weights that the model has on its device."""
    assert model is not None
    return sum(weights.nbytes for weights in model.module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("settings", "objectives"),
    [
        ([], [DIVERGENCE]),
        ([], [Divergence("jsd", k=20, contrast=0.7)]),
        (["teacher.kind=frozen"], [Dpo(0.1)]),
        (["teacher.kind=external"], [DIVERGENCE]),
        (["teacher.kind=external", "lora.rank=4"], [DIVERGENCE]),
        (["reference.kl=0.1", "reference.offload=true"], [DIVERGENCE, ReferenceKL(k=20)]),
    ],
    ids=["ema", "contrast", "dpo", "external", "external of adapters", "reference"],
)
def test_steps_are_the_same_to_the_bit(
    make: Make, tmp_path: Path, dtype: str, settings: list[str], objectives: list[Objective]
) -> None:
    settings = [*settings, f"model.dtype={dtype}", CPU]
    if "teacher.kind=external" in settings:
        settings.append(f"teacher.path={make_random_model(tmp_path, seed=7)}")
    resident = [word for word in settings if word != "reference.offload=true"]
    engines = [make(*resident), make(*settings, "teacher.offload=true")]
    assert isinstance(engines[1].teacher.model, OffloadedModel)
    told = [steps(engine, 3, *objectives) for engine in engines]
    assert told[0] == told[1]
    assert told[0][0]["signal"] < 0 and told[0][0] != told[0][2]
    assert_same(engines)


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_steps_of_a_narrow_student_are_the_same_to_the_bit(make: Make, kind: str) -> None:
    """Its average is in float32, on the host too."""
    settings = [
        CPU,
        f"teacher.kind={kind}",
        "model.dtype=bfloat16",
        "optimizer.weights=bfloat16",
        "optimizer.moments=int8",
    ]
    engines = [make(*settings, f"teacher.offload={offload}") for offload in (False, True)]
    told = [steps(engine, 3, DIVERGENCE) for engine in engines]
    assert told[0] == told[1]
    assert_same(engines)
    averages = engines[1].teacher.model.named_parameters().values()  # type: ignore[union-attr]
    assert {average.dtype for average in averages} == {torch.float32 if kind == "ema" else torch.bfloat16}


@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpoint_of_one_continues_with_the_other(make: Make, tmp_path: Path, offload: bool) -> None:
    """Also where the average would be lost in bfloat16."""
    settings = [CPU, "model.dtype=bfloat16", "teacher.ema_rate=0.01"]
    engines = [make(*settings, f"teacher.offload={to}") for to in (offload, offload)]
    for engine in engines:
        steps(engine, 1, DIVERGENCE)
    engines[0].save(tmp_path)
    engines[0] = make(*settings, f"teacher.offload={not offload}")
    engines[0].load(tmp_path)
    assert_same(engines)
    for engine in engines:
        steps(engine, 2, DIVERGENCE)
    assert_same(engines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_on_the_device_while_it_reads_and_then_the_head_alone(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    whole = random_model(tmp_path, Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=tied), dtype)
    model, sizes = OffloadedModel(whole), {n: p.numel() for n, p in whole.named_parameters().items()}
    assert on_device(model) == 0
    embedding = sizes["model.embed_tokens.weight"]
    matrices = sum(size for name, size in sizes.items() if "proj" in name or name == "lm_head.weight")
    with model.on_device() as head:
        assert on_device(model) == 4 * (sum(sizes.values()) - matrices) + dtype.itemsize * matrices
    assert on_device(model) == 0
    assert head.weight.nbytes == dtype.itemsize * embedding and torch.equal(head.weight, whole.head.weight.to(dtype))
    scored = head.weight.clone()
    for average in model.named_parameters().values():
        average.data.add_(1.0)
    assert torch.equal(head.weight, scored), "it is the head that scored, also after the average has moved"
    for use in (model.save, model.load):
        use(tmp_path / "saved")
        assert on_device(model) == 0


def test_a_pass_that_fails_leaves_nothing_on_the_device(tmp_path: Path) -> None:
    model = OffloadedModel(random_model(tmp_path, LlamaConfig(**SIZES), torch.float32))
    with pytest.raises(torch.OutOfMemoryError), model.on_device():
        raise torch.OutOfMemoryError
    assert on_device(model) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_weights_are_in_pinned_memory_and_the_run_is_the_same_to_rounding(make: Make) -> None:
    resident, offloaded = (
        make("model.device=cuda", "model.dtype=bfloat16", f"teacher.offload={to}") for to in ("false", "true")
    )
    told = [steps(engine, 1, DIVERGENCE)[0] for engine in (resident, offloaded)]
    assert told[0]["loss"] == pytest.approx(told[1]["loss"], rel=1e-3)
    model, other = offloaded.teacher.model, resident.teacher.model
    assert model is not None and other is not None
    sizes = 0
    for name, average in model.named_parameters().items():
        assert average.device.type == "cpu" and average.is_pinned() and average.dtype == torch.float32
        torch.testing.assert_close(average.data, other.named_parameters()[name].cpu(), rtol=1e-3, atol=1e-4)
        sizes += average.nbytes
    before = torch.cuda.memory_allocated()
    with model.on_device() as head:
        assert torch.cuda.memory_allocated() - before > 0.5 * sizes
    assert torch.cuda.memory_allocated() - before <= head.weight.nbytes + 512
    del head
    assert torch.cuda.memory_allocated() == before


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
        Phi3Config(**SIZES),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
        Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_narrowed_weights_read_as_autocast_would(tmp_path: Path, config: PreTrainedConfig) -> None:
    whole = random_model(tmp_path, config, torch.bfloat16)
    offloaded = OffloadedModel(whole)
    with torch.no_grad(), offloaded.on_device() as head:
        found = [(m.response_hidden_TH(PROMPTS, RESPONSES), h) for m, h in computing(whole, offloaded, head)]
    (expected_TH, _), (got_TH, _) = found
    assert torch.equal(got_TH, expected_TH) and got_TH.dtype == expected_TH.dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(got_TH), whole.head(expected_TH))


def computing(whole: LanguageModel, offloaded: LanguageModel, head: torch.nn.Linear):  # type: ignore[no-untyped-def]
    for model, own in ((whole, whole.head), (offloaded, head)):
        with model.computing():
            yield model, own


def random_model(directory: Path, config: PreTrainedConfig, dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    device = torch.device("cpu")
    return load_model(str(directory), key="model.path", dtype=dtype, weights=torch.float32, device=device)
