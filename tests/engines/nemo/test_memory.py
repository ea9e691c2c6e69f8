import json
from pathlib import Path

import pytest

from mopd_nemo.config import Config, DivergenceConfig, LoraConfig, ModelConfig, TeacherConfig, TrainConfig
from mopd_nemo.config.cluster import NemoConfig, ParallelConfig, VllmConfig
from mopd_nemo.engines.architecture import KNOWN, Architecture, architecture_of
from mopd_nemo.engines.nemo.memory import RESERVE_GB, check_divisible, estimate
from tests.conftest import SIZES

EIGHT_B = KNOWN["Qwen/Qwen3-8B"]


def config(nodes: int = 1, tokens: int = 16384, **student: int | bool) -> Config:
    return Config(
        engine="nemo",
        model=ModelConfig(dtype="bfloat16"),
        train=TrainConfig(tokens_per_micro_batch=tokens),
        nemo=NemoConfig(num_nodes=nodes, student=ParallelConfig.model_validate(student)),
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen3-1.7B", 1.72),
        ("Qwen/Qwen3-4B", 4.02),
        ("Qwen/Qwen3-8B", 8.19),
        ("Qwen/Qwen3-14B", 14.77),
        ("Qwen/Qwen3-32B", 32.76),
        ("Qwen/Qwen3-30B-A3B", 30.53),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.55),
    ],
)
def test_parameters_are_the_published_number(name: str, billions: float) -> None:
    assert KNOWN[name].parameters / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("experts", [0, 4])
def test_parameters_are_those_of_the_real_model(experts: int, tmp_path: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = SIZES | {"tie_word_embeddings": experts == 0}
    with torch.device("meta"):
        if experts:
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=experts, moe_intermediate_size=24))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.config.save_pretrained(tmp_path)
    found = architecture_of(str(tmp_path), None)
    assert found is not None
    assert found.parameters == sum(weight.numel() for weight in model.parameters())


def test_training_state_is_by_hand() -> None:
    """One layer, no vocabulary to speak of: 6 bytes a weight, and 12 more shared by four data-parallel ranks."""
    model = Architecture(layers=1, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=12288, vocab=1)
    needed = estimate(config(tensor=2, sequence=True), model, None, 80)["update"] - RESERVE_GB
    weights = model.parameters / 2
    fixed = weights * (6 + 12 / 4) / 1e9
    kept = 16384 * 2 * 4096 / 2 / 1e9
    working = 16384 * 4 * (4 * 4096 + 80 * 128 + 3 * 12288) / 2 / 1e9
    assert needed == pytest.approx(fixed + kept + working, rel=1e-3)


def test_the_whole_vocabulary_needs_the_teachers_head_too() -> None:
    base, full = config(tensor=2), config(tensor=2)
    full = full.model_copy(update={"divergence": DivergenceConfig(support="full")})
    base = base.model_copy(update={"divergence": DivergenceConfig(support="teacher_topk")})
    more = estimate(full, EIGHT_B, None, 80)["update"] - estimate(base, EIGHT_B, None, 80)["update"]
    assert more == pytest.approx(2 * 151936 * 4096 / 2 / 1e9)


def test_more_parallelism_and_shorter_batches_need_less() -> None:
    base = estimate(config(tensor=2), EIGHT_B, None, 80)["update"]
    for other in (
        config(tensor=2, sequence=True),
        config(tensor=4),
        config(tensor=2, pipeline=2),
        config(tensor=2, context=2),
        config(nodes=2, tensor=2),
        config(tensor=2, tokens=14336),
    ):
        assert estimate(other, EIGHT_B, None, 80)["update"] < base


def test_generation_on_gpus_of_its_own_holds_no_training_weights() -> None:
    shared = config(nodes=2, tensor=2)
    apart = shared.model_copy(update={"nemo": shared.nemo.model_copy(update={"generation": VllmConfig(gpus=8)})})
    difference = estimate(shared, EIGHT_B, None, 80)["generate"] - estimate(apart, EIGHT_B, None, 80)["generate"]
    assert difference == pytest.approx(EIGHT_B.parameters / 1e9, rel=0.01)  # 2 bytes, cut in two


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (ParallelConfig(pipeline=5), "nemo.student.pipeline=5 does not divide the model's 36 layers"),
        (ParallelConfig(tensor=16), "does not divide the model's 32 attention heads and 8 key-value heads"),
        (ParallelConfig(expert=2), "does not divide the model's 0 experts"),
    ],
)
def test_model_that_cannot_be_cut_so(student: ParallelConfig, message: str) -> None:
    assert message in (check_divisible("student", EIGHT_B, student) or "")


def test_model_is_found_in_a_hugging_face_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    sizes = {
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 16,
        "vocab_size": 5,
    }
    (snapshot / "config.json").write_text(json.dumps(sizes))
    found = architecture_of("some/model", str(tmp_path))
    assert found is not None and (found.head_dim, found.kv_heads) == (4, 2)
    assert architecture_of("other/model", str(tmp_path)) is None


def test_a_small_teacher_needs_no_less_than_the_students_own_pass() -> None:
    """With several updates the student names the tokens first; else it is spared that, and its optimiser's stay."""
    small = KNOWN["Qwen/Qwen3-1.7B"]
    several = external("student_topk", updates=2)
    alone = estimate(several, EIGHT_B, EIGHT_B, 80)["score"]
    assert estimate(several, EIGHT_B, small, 80)["score"] == alone
    for spared in (external("teacher_topk"), external("student_topk"), external("full")):
        assert estimate(spared, EIGHT_B, small, 80)["score"] < alone


def test_a_self_teacher_scores_in_the_students_weights_of_which_a_share_is_set_aside() -> None:
    """8B on TP 2, DP 4: 2 bytes of an eighth of the weights."""
    needed = {}
    for kind in ("live", "ema", "frozen"):
        teacher = TeacherConfig(kind=kind)
        needed[kind] = estimate(config(tensor=2).model_copy(update={"teacher": teacher}), EIGHT_B, None, 80)
    assert needed["ema"]["score"] - needed["live"]["score"] == pytest.approx(2 * EIGHT_B.parameters / 8 / 1e9, rel=0.01)
    assert needed["ema"].phases == needed["frozen"].phases and needed["ema"]["update"] == needed["live"]["update"]


def external(support: str, updates: int = 1) -> Config:
    teacher = {"kind": "external", "path": "some/teacher"}
    return Config.model_validate(
        {
            "engine": "nemo",
            "teacher": teacher,
            "divergence": {"support": support},
            "train": {"tokens_per_micro_batch": 16384, "num_updates_per_step": updates},
        }
    )


def test_adapters_alone_have_gradients_and_an_optimiser() -> None:
    base = config(tensor=2).model_copy(update={"teacher": TeacherConfig(kind="live")})
    adapted = base.model_copy(update={"lora": LoraConfig(rank=16)})
    whole, own = (estimate(c, EIGHT_B, None, 80).phases["update"] for c in (base, adapted))
    assert own["weights"] == whole["weights"]
    assert own["gradients"] + own["optimiser"] < 0.01 * (whole["gradients"] + whole["optimiser"])
    per_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288)
    assert EIGHT_B.adapters(16) == 16 * 36 * per_layer
    assert EIGHT_B.adapters(16, ("q_proj",)) == 16 * 36 * 2 * 4096
