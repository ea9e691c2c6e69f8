"""Adapters against what they stand for: full matrices, and the model that they are merged into."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mopd_nemo.config import LoraConfig, UserError
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local import llama
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.lora import AdaptedModel, SeededDropout
from mopd_nemo.engines.local.model import LanguageModel, load_model
from mopd_nemo.losses.objectives import Divergence, PolicyGradient
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import TrainExample

Make = Callable[..., LocalEngine]
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
ROWS = [
    TrainExample(0, r, (5, 6, 7), (8 + r, 9, 10, 11), (-2.0,) * 4, (50, 51, *range(20, 40), 5, 6, 7), 1.0 - 2 * r)
    for r in range(2)
]
LORA = ("lora.rank=4", "lora.alpha=8")


def update(engine: LocalEngine, learning_rate: float = 1e-2) -> dict[str, float]:
    batch = TrainBatch(ROWS, [LossTerm(Divergence(support="full"), (0, 1))])
    targets, _ = engine.score(batch)
    metrics = engine.update(batch, targets, learning_rate)
    engine.update_teacher()
    return metrics


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad(), model.computing():
        return model.head(model.hidden_BSH(IDS)).float()


def stored(*models: LanguageModel | None) -> int:
    """Bytes of all weights of some models, shared ones once."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models if m for p in m.module.parameters()
    }
    return sum(storages.values())


def trained_bytes(model: LanguageModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.trained().values())


@pytest.mark.parametrize("kind", ["live", "frozen", "ema"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_teacher_holds_a_second_copy_of_the_base(make: Make, kind: str, dtype: str) -> None:
    engine = make(*LORA, f"teacher.kind={kind}", f"model.dtype={dtype}")
    teacher = engine.teacher.model
    adapters = trained_bytes(engine.student)
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in engine.student.trained().items())
    assert stored(engine.student, teacher) == stored(engine.student) + adapters * (kind == "ema")
    width = {"float32": 4, "bfloat16": 2}[dtype]
    whole = stored(make("teacher.kind=none", "method=grpo").student)
    assert stored(engine.student) - adapters == whole * width // 4, "the base is kept once, in the compute precision"


def test_only_adapters_move_and_teachers_follow_as_they_should(make: Make) -> None:
    for kind in ("live", "frozen", "ema"):
        engine = make(*LORA, f"teacher.kind={kind}")
        assert isinstance(engine.student, AdaptedModel)
        base = {name: p.clone() for name, p in engine.student.base.named_parameters().items()}
        before = {name: p.detach().clone() for name, p in engine.student.trained().items()}
        initial = logits(engine.student)
        assert engine.teacher.model is not None
        assert torch.equal(logits(engine.teacher.model), initial), "B begins at 0"
        metrics = update(engine)
        assert metrics["update/skipped"] == 0.0
        for name, p in engine.student.base.named_parameters().items():
            assert torch.equal(p, base[name])
        after = engine.student.trained()
        assert all(not torch.equal(after[name], before[name]) for name in after if "lora_B" in name)
        assert not torch.allclose(logits(engine.student), initial, atol=1e-3)
        if kind == "live":
            assert engine.teacher.model is engine.student
        elif kind == "frozen":
            assert torch.equal(logits(engine.teacher.model), initial)
        else:
            for name, average in engine.teacher.model.named_parameters().items():
                if name in before:
                    torch.testing.assert_close(average, before[name].lerp(after[name], engine._config.teacher.ema_rate))


def test_merged_weights_give_the_logits_of_adapters(make: Make, random_model: Path) -> None:
    engine = make(*LORA)
    for _ in range(3):
        update(engine)
    plain = load_model(str(random_model), key="model.path", dtype=torch.float32, weights=torch.float32, device=CPU)
    before, adapted = logits(plain), logits(engine.student)
    state = dict(engine.student.sampled_weights())
    assert state.keys() == plain.named_parameters().keys()
    plain.module.load_state_dict(state, strict=False)
    assert (logits(plain) - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert (before - adapted).abs().max() > 1e-2 * adapted.abs().max()


def test_the_sampler_and_the_learner_agree_on_adapters(make: Make) -> None:
    engine = make(*LORA)
    for _ in range(3):
        update(engine)
    assert llama.is_like_llama(engine.student.module), "else the sampler would be the slow one"
    groups = engine.generate(Request([(5, 6, 7)], 8, Sampling(12), "a"))
    found = engine.response_logprobs([(5, 6, 7)] * 8, [rollout.response_ids for rollout in groups[0]])
    for rollout, logprobs in zip(groups[0], found, strict=True):
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_prefix_trees_see_adapters(make: Make) -> None:
    engine = make(*LORA)
    for _ in range(3):
        update(engine)
    student = engine.student
    assert student.reads_trees
    rows = [list(range(40))] * 3, [[50, 51, 52], [53, 54], [55]]
    torch.testing.assert_close(student.hidden_by_tree_TH(*rows), student.hidden_by_row_TH(*rows), atol=1e-4, rtol=1e-4)


def test_full_rank_is_full_training_of_those_matrices(make: Make) -> None:
    """With A held at the identity, W + B moves as W does: Adam starts both from a zero moment."""
    settings = ("optimizer.weight_decay=0", "teacher.kind=frozen", "train.num_steps=3")
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]  # of which the inputs are the hidden states
    full = make(*settings)
    size = full.student.module.config.hidden_size
    low = make(*settings, f"lora.rank={size}", f"lora.alpha={size}", f"lora.targets=[{','.join(targets)}]")
    with torch.no_grad():
        for name, p in low.student.trained().items():
            if "lora_A" in name:
                p.requires_grad_(False).copy_(torch.eye(size))
    for name, p in full.student.named_parameters().items():
        p.requires_grad_(any(f"{target}.weight" in name for target in targets))
    start = {name: p.detach().clone() for name, p in full.student.named_parameters().items()}
    for _ in range(3):
        losses = [update(engine, learning_rate=1e-3)["loss"] for engine in (full, low)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    moved = 0.0
    for name, weights in low.student.sampled_weights():
        trained = full.student.named_parameters()[name].detach()
        assert (weights - trained).abs().max() < 1e-5
        moved = max(moved, (trained - start[name]).abs().max().item())
    assert moved > 1e-3


def test_layers_that_are_computed_again_give_the_same_update(make: Make) -> None:
    engines = [make(*LORA, f"train.activation_checkpointing={again}") for again in ("false", "true")]
    assert engines[1].student._recompute
    for _ in range(2):
        first, second = [update(engine) for engine in engines]
        assert first == pytest.approx(second, rel=1e-6)
    for name, p in engines[0].student.trained().items():
        torch.testing.assert_close(p, engines[1].student.trained()[name])


DROPPING = (*LORA, "lora.dropout=0.3")


def test_dropout_keeps_what_a_layer_gives_on_average() -> None:
    torch.manual_seed(0)
    place, layer, inputs = SeededDropout(0.3, "layer"), nn.Linear(16, 4, bias=False), torch.randn(8, 16)
    assert place(inputs) is inputs
    zeros, mean, draws, farthest = 0.0, torch.zeros(8, 4), 4000, 0.0
    with torch.no_grad():
        expected = layer(inputs)
        for draw in range(draws):
            place.seed = f"0/dropout/0/{draw}"
            dropped = place(inputs)
            zeros += (dropped == 0).float().mean().item() / draws
            mean += layer(dropped) / draws
            farthest = max(farthest, (layer(dropped) - expected).abs().max().item())
    assert zeros == pytest.approx(0.3, abs=3e-3)
    torch.testing.assert_close(mean, expected, atol=0.05, rtol=0)
    assert farthest > 0.5


def test_a_mask_is_a_function_of_update_micro_batch_and_layer() -> None:
    inputs = torch.ones(64, 64)
    found = set()
    for name in ("q_proj", "k_proj"):
        for seed in ("0/dropout/0/1", "0/dropout/0/2", "0/dropout/1/1", "1/dropout/0/1"):
            masks = []
            for _ in range(2):
                place = SeededDropout(0.3, name)
                place.seed = seed
                masks.append(place(inputs))
                torch.rand(3)
            assert torch.equal(*masks)
            found.add(tuple(masks[0].flatten().tolist()))
    assert len(found) == 8


@pytest.mark.parametrize("again", ["false", "true"])
def test_only_an_update_drops_inputs(make: Make, again: str, tmp_path: Path) -> None:
    """Everything that is read or drawn equals what an engine without dropout gives with the same adapters."""
    settings = ("teacher.kind=ema", f"train.activation_checkpointing={again}")
    engine, plain = make(*DROPPING, *settings), make(*LORA, *settings)
    for _ in range(2):
        update(engine)
    engine.save(tmp_path)
    plain.load(tmp_path)
    batch = TrainBatch(ROWS, [LossTerm(Divergence(support="full"), (0, 1))])
    found = []
    for one in (engine, plain):
        targets, _ = one.score(batch)
        signals = one.token_signal(batch, targets, 3)
        told = [(signal.divergence.tolist(), signal.student_top.tolist()) for signal in signals if signal]
        rollouts = [(r.response_ids, r.logprobs) for r in one.generate(Request([(5, 6, 7)], 4, Sampling(8), "a"))[0]]
        read = one.response_logprobs([(5, 6, 7)], [(8, 9, 10)])
        found.append((told, rollouts, read, logits(one.student).tolist()))
    assert found[0] == found[1]
    assert update(engine)["loss"] != update(plain)["loss"]
    assert not any(module.training for module in engine.student.module.modules()), "the base has its own dropout"


def test_no_other_model_drops_while_the_student_does(make: Make) -> None:
    engine = make(*DROPPING, "teacher.kind=ema")
    update(engine)
    others = [engine._copied_student(), engine.student.initial(), engine.teacher.model]
    before = [logits(other) for other in others if other]
    student = logits(engine.student)
    with engine.student.dropping("0"):
        assert not torch.equal(logits(engine.student), student)
        assert all(torch.equal(logits(other), own) for other, own in zip(others, before, strict=True) if other)
    assert torch.equal(logits(engine.student), student)


def test_passes_with_a_gradient_drop_and_no_others(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratios of a second update refer to the policy that samples, which drops nothing."""
    engine = make(*DROPPING, "seed=3", "train.num_updates_per_step=2")
    read, seen = engine.student.response_hidden_TH, []
    place = next(module for module in engine.student.module.modules() if isinstance(module, SeededDropout))

    def watched(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        seen.append((torch.is_grad_enabled(), place.seed))
        return read(prompts, responses)

    monkeypatch.setattr(engine.student, "response_hidden_TH", watched)
    rows = [replace(row, group_index=number) for number, row in enumerate(ROWS)]
    for _ in range(2):
        engine.update(TrainBatch(rows, [LossTerm(PolicyGradient(), (0, 1))]), [None, None], 1e-2)
    old = (False, None)
    assert seen[:3] == [old, (True, "3/dropout/0/1"), (True, "3/dropout/1/1")]
    assert seen[3:] == [old, (True, "3/dropout/2/1"), (True, "3/dropout/3/1")]


def test_dropped_inputs_are_the_same_after_a_resume_and_when_computed_again(make: Make, tmp_path: Path) -> None:
    settings = (*LORA, "teacher.kind=live", "train.tokens_per_micro_batch=8")
    engine, again = (make(*settings, "lora.dropout=0.3", f"train.activation_checkpointing={way}") for way in (0, 1))
    for number in range(3):
        assert update(again) == update(engine)
        for name, p in engine.student.trained().items():
            assert torch.equal(p, again.student.trained()[name])
        if number == 0:
            engine.save(tmp_path)
    resumed = make(*settings, "lora.dropout=0.3")
    resumed.load(tmp_path)
    for _ in range(2):
        update(resumed)
    assert all(torch.equal(p, resumed.student.trained()[name]) for name, p in engine.student.trained().items())


def test_without_dropout_nothing_is_in_the_way(make: Make) -> None:
    assert not any(isinstance(module, SeededDropout) for module in make(*LORA).student.module.modules())


def test_the_first_matrices_are_a_function_of_the_seed(make: Make) -> None:
    first, again, other = (make(*LORA, f"seed={seed}").student.trained() for seed in (1, 1, 2))
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert all(not torch.equal(p, other[name]) for name, p in first.items() if "lora_A" in name)
    widest = max(p.abs().max().item() * p.shape[1] ** 0.5 for name, p in first.items() if "lora_A" in name)
    assert 0.9 < widest <= 1.0


def test_unknown_targets_are_told_what_there_is(make: Make) -> None:
    with pytest.raises(UserError, match=r"lora.targets=\[q_porj\].*are down_proj, gate_proj.*v_proj, and not q_porj"):
        make("lora.rank=4", "lora.targets=[q_porj]")
    with pytest.raises(UserError, match=r"and not lm_head"):
        make("lora.rank=4", "lora.targets=[lm_head]")
    with pytest.raises(UserError, match=r"lora.alpha=7 is unused by lora.rank=0"):
        make("lora.alpha=7")


def test_a_share_that_leaves_nothing_is_refused(make: Make) -> None:
    for dropout, message in ((1, "should be less than 1"), (-0.1, "should be greater than or equal to 0")):
        with pytest.raises(UserError, match=f"lora.dropout={dropout}: input {message}"):
            make("lora.rank=4", f"lora.dropout={dropout}")
    with pytest.raises(UserError, match=r"lora.dropout=0.1 is unused by lora.rank=0"):
        make("lora.dropout=0.1")


def test_a_layer_can_be_named_alone(make: Make) -> None:
    names = make("lora.rank=2", "lora.targets=[0.self_attn.q_proj]").student.trained()
    assert len(names) == 2
    assert all("layers.0.self_attn.q_proj.lora_" in name for name in names)


def test_peft_loads_what_is_saved_and_a_model_path_may_be_it(make: Make, random_model: Path, tmp_path: Path) -> None:
    engine = make(*LORA, "teacher.kind=ema")
    for _ in range(2):
        update(engine)
    engine.save(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_model), str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, logits(engine.student), atol=1e-5)
    for directory, model in ((tmp_path, engine.student), (tmp_path / "teacher", engine.teacher.model)):
        assert model is not None
        read = load_model(str(directory), key="model.path", dtype=torch.float32, weights=torch.float32, device=CPU)
        assert (
            read.named_parameters().keys()
            == load_model(str(random_model), key="model.path", dtype=torch.float32, weights=torch.float32, device=CPU)
            .named_parameters()
            .keys()
        )
        assert torch.allclose(logits(read), logits(model), atol=1e-5)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_save_is_continued_exactly_and_only_on_its_base(make: Make, random_model: Path, tmp_path: Path) -> None:
    settings = (*LORA, "teacher.kind=ema", "model.dtype=bfloat16")
    engine = make(*settings)
    update(engine)
    engine.save(tmp_path)
    resumed = make(*settings, "seed=7")
    resumed.load(tmp_path)
    for a, b in ((engine.student, resumed.student), (engine.teacher.model, resumed.teacher.model)):
        assert a is not None
        assert b is not None
        assert all(torch.equal(p, b.named_parameters()[name]) for name, p in a.named_parameters().items())
    assert update(engine) == update(resumed)
    assert all(torch.equal(p, resumed.student.trained()[name]) for name, p in engine.student.trained().items())

    for change, message in (
        ("lora.rank=2", r"lora.rank=4, and the run's are of 2"),
        ("lora.alpha=16", r"lora.alpha=8, and the run's are of 16"),
        ("lora.targets=[q_proj]", r"lora.targets=\[down_proj, .*are of \[q_proj\]"),
    ):
        with pytest.raises(UserError, match=message):
            make(*settings, change).load(tmp_path)
    with pytest.raises(UserError, match=r"holds adapters, and lora.rank=0"):
        make("teacher.kind=ema").load(tmp_path)
    with pytest.raises(UserError, match=r"holds adapters, and lora.rank=4 needs a whole model"):
        make(*LORA, f"model.path={tmp_path}")
    other = make(*settings)
    with torch.no_grad():
        next(other.student.module.parameters())[0, 0] += 1  # type: ignore[index]
    with pytest.raises(UserError, match="belong to another base model than this one"):
        other.load(tmp_path)


def test_adapters_are_refused_where_a_whole_model_is_needed(make: Make, tmp_path: Path) -> None:
    make(*LORA).save(tmp_path)
    with pytest.raises(UserError, match=r"generation.backend=vllm needs a whole model: make one with `mopd export"):
        make(f"model.path={tmp_path}", "generation.backend=vllm")


def test_a_full_checkpoint_is_refused(make: Make, tmp_path: Path) -> None:
    make("teacher.kind=live").save(tmp_path)
    with pytest.raises(UserError, match=r"holds all weights of a model and no adapters, and lora.rank=4"):
        make(*LORA, "teacher.kind=live").load(tmp_path)


def test_a_model_without_names_for_its_layers_is_refused(random_model: Path) -> None:
    base = load_model(str(random_model), key="model.path", dtype=torch.float32, weights=torch.float32, device=CPU)
    with pytest.raises(UserError, match=r"lora.targets=\[\]: the linear layers of .* are down_proj"):
        AdaptedModel(base, LoraConfig(rank=1, targets=()), str(random_model), "0")
