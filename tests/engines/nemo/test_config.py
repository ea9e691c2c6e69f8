"""Settings of the engine that cannot run are refused before anything starts, and NeMo-RL's block follows the rest."""

from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import config_from, load_config
from mopd_nemo.engines.nemo.checks import check_models, check_surroundings
from mopd_nemo.engines.nemo.policy_config import NAMED_RATE, student_policy, teacher_policy

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "nemo").glob("*.yaml"))


def make(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "engine": "nemo",
        "data": {"max_prompt_tokens": 100},
        "peers": {"max_context_tokens": 400},
        "rollout": {"max_response_tokens": 200},
        "train": {"tokens_per_micro_batch": 1000},
    }
    for section, own in changes.items():
        values[section] = values.get(section, {}) | own if isinstance(own, dict) else own
    return config_from(values, "test.yaml")


EXTERNAL = {"kind": "external", "path": "some/teacher"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"nemo": {"student": {"tensor": 3}}},
            r"nemo.student.tensor=3 × pipeline=1 × context=1 = 3 GPUs .* its 8 GPUs",
        ),
        ({"nemo": {"student": {"tensor": 4, "pipeline": 4}}}, "= 16 GPUs a copy do not divide its 8 GPUs"),
        ({"nemo": {"student": {"expert": 3}}}, "nemo.student.expert=3 does not divide the 8 GPUs"),
        ({"nemo": {"student": {"sequence": True}}}, "raise nemo.student.tensor or set it false"),
        ({"nemo": {"student": {"context": 2}, "batching": "dynamic"}}, "needs nemo.batching=packed, not dynamic"),
        ({"nemo": {"student": {"pipeline": 2}, "batching": "dynamic"}}, "excludes nemo.batching=dynamic"),
        (
            {"nemo": {"backend": "dtensor"}},
            "nemo.batching=packed needs nemo.backend=megatron: .* nemo.batching=dynamic",
        ),
        (
            {"nemo": {"backend": "dtensor", "batching": "padded", "student": {"pipeline": 2}}},
            "nemo.student.pipeline=2 needs nemo.backend=megatron",
        ),
        (
            {"nemo": {"backend": "dtensor", "batching": "padded", "student": {"tensor": 2, "sequence": True}}},
            "nemo.student.sequence=true needs nemo.backend=megatron",
        ),
        (
            {"nemo": {"policy": {"generation": {"vllm_cfg": {"async_engine": True}}}}},
            "nemo.policy.generation.vllm_cfg.async_engine=true: .* leave it out",
        ),
        (
            {"nemo": {"policy": {"dtensor_cfg": {"enabled": True}}}},
            "nemo.policy.dtensor_cfg.enabled=True: choose with nemo.backend",
        ),
        ({"nemo": {"generation": {"gpus": 8}}}, "leave the student none of the 8 GPUs"),
        ({"nemo": {"generation": {"gpus": 4}, "num_nodes": 2}}, "not a number of whole nodes"),
        ({"nemo": {"generation": {"tensor": 3}}}, "nemo.generation.tensor=3 does not divide the 8 GPUs"),
        ({"nemo": {"generation": {"gpus": 2, "tensor": 4}, "gpus_per_node": 8}}, "does not divide the 2 GPUs"),
        ({"nemo": {"teacher_gpus": 2}}, "set nemo.teacher_gpus=0 or teacher.kind=external"),
        ({"nemo": {"teacher": {"tensor": 3}}, "teacher": EXTERNAL}, "nemo.teacher.tensor=3"),
        (
            {"divergence": {"support": "full"}, "nemo": {"backend": "dtensor", "batching": "dynamic"}},
            "which nemo.backend=dtensor does not give: set divergence.support=student_topk",
        ),
        (
            {"lora": {"rank": 8, "targets": ["q_proj"]}, "teacher": EXTERNAL},
            r"lora.targets=\['q_proj'\] .* the layers of Megatron are linear_qkv, linear_proj",
        ),
        (
            {"lora": {"rank": 8}, "teacher": EXTERNAL, "nemo": {"backend": "dtensor", "batching": "padded"}},
            "lora.rank=8 with engine=nemo needs nemo.backend=megatron, not dtensor",
        ),
        ({"model": {"device": "cuda"}}, "with engine=nemo leave it at auto"),
        ({"train": {"tokens_per_micro_batch": 500}}, "peers.max_context_tokens=400 .* are 600 tokens, more than"),
        (
            {"train": {"tokens_per_micro_batch": 601}, "nemo": {"student": {"tensor": 8}}},
            "padded to a multiple of 16, are 608 tokens",
        ),
        ({"nemo": {"num_node": 2}}, r"unknown key nemo.num_node; did you mean nemo.num_nodes\?"),
        (
            {"method": "gkd", "teacher": EXTERNAL, "peers": {"max_context_tokens": 400}},
            "mopd complete",
        ),
    ],
)
def test_settings_that_cannot_run_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_settings_of_another_engine_do_not_matter() -> None:
    assert make(engine="local", divergence={"support": "full"}).engine == "local"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nemo": {"student": {"tensor": 8}}}, "nemo.student.tensor=8 does not divide the model's 4 attention heads"),
        ({"nemo": {"student": {"tensor": 4}}}, "nemo.student.tensor=4 does not divide the model's 2 key-value heads"),
        ({"nemo": {"student": {"pipeline": 8}}}, "nemo.student.pipeline=8 does not divide the model's 4 layers"),
        ({"nemo": {"generation": {"tensor": 8}}}, "nemo.generation.tensor=8 does not divide the 4 attention heads"),
        (
            {"rollout": {"max_response_tokens": 2000}, "train": {"tokens_per_micro_batch": 4000}},
            "exceeds the 2048 positions of model.path",
        ),
        ({"model": {"path": "/nowhere"}}, "model.path=/nowhere: no such directory"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_models(make(**changes))


def test_vocabularies_are_compared_before_anything_starts(tmp_path: Path, random_model: Path) -> None:
    config = make(teacher={"kind": "external", "path": str(random_model)})
    assert check_models(config) == 428
    for file in random_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace('"<|im_start|>"', '"<|im_begin|>"'))
    with pytest.raises(UserError, match="its tokenizer differs"):
        check_models(make(teacher={"kind": "external", "path": str(tmp_path)}))


def test_missing_nemo_rl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="engine=nemo needs NeMo-RL, which is not on a package index"):
        check_surroundings("megatron")


def test_policy_follows_the_settings() -> None:
    config = make(
        nemo={
            "num_nodes": 4,
            "student": {"tensor": 2, "context": 2, "sequence": True},
            "generation": {"gpus": 8, "tensor": 2},
            "policy": {
                "megatron_cfg": {"fp8_cfg": {"enabled": True}},
                "generation": {"vllm_cfg": {"precision": "fp8"}},
            },
        },
        optimizer={"learning_rate": 3e-6, "betas": [0.8, 0.9], "max_grad_norm": 0.5},
        model={"dtype": "bfloat16"},
    )
    policy = student_policy(config)
    megatron, generation = policy["megatron_cfg"], policy["generation"]
    assert (megatron["tensor_model_parallel_size"], megatron["context_parallel_size"]) == (2, 2)
    assert megatron["sequence_parallel"] and megatron["fp8_cfg"] == {"enabled": True}
    assert megatron["optimizer"]["lr"] == NAMED_RATE and megatron["optimizer"]["bf16"]
    assert (megatron["optimizer"]["adam_beta1"], megatron["optimizer"]["adam_beta2"]) == (0.8, 0.9)
    assert megatron["optimizer"]["clip_grad"] == 0.5
    assert policy["make_sequence_length_divisible_by"] == 8
    assert policy["sequence_packing"]["enabled"] and not policy["dynamic_batching"]["enabled"]
    assert generation["colocated"] == {"enabled": False, "resources": {"num_nodes": 1, "gpus_per_node": 8}}
    assert generation["vllm_cfg"]["precision"] == "fp8" and generation["vllm_cfg"]["max_model_len"] == 300
    assert generation["temperature"] == 1.0  # NeMo-RL would scale training logits by it
    # Newer NeMo-RLs than v0.7.0 take vLLM's default without it: log-probabilities of what was not sampled from.
    assert generation["vllm_cfg"]["logprobs_mode"] == "processed_logprobs"


def test_adapters_are_the_students_alone() -> None:
    config = make(lora={"rank": 8, "alpha": 24, "targets": ["linear_qkv"]}, teacher=EXTERNAL)
    peft = student_policy(config)["megatron_cfg"]["peft"]
    assert peft["enabled"] and (peft["dim"], peft["alpha"], peft["target_modules"]) == (8, 24, ["linear_qkv"])
    assert peft["dropout"] == 0.0 and peft["lora_B_init_method"] == "zero"
    dropping = student_policy(make(lora={"rank": 8, "dropout": 0.2}, teacher=EXTERNAL))["megatron_cfg"]["peft"]
    assert (dropping["dropout"], dropping["dropout_position"]) == (0.2, "pre"), "as the local engine's"
    assert "peft" not in teacher_policy(config)["megatron_cfg"]
    assert "peft" not in student_policy(make())["megatron_cfg"]
    live = make(lora={"rank": 8}, teacher={"kind": "live"}, peers={"when_no_success": "skip"})
    assert len(student_policy(live)["megatron_cfg"]["peft"]["target_modules"]) == 4


def test_scoring_packs_twice_the_tokens_of_an_update() -> None:
    """A pass without gradients has room for them, and a prompt is shared within one packed row alone."""
    packed = student_policy(make())["sequence_packing"]
    assert (packed["train_mb_tokens"], packed["logprob_mb_tokens"]) == (1000, 2000)
    dynamic = student_policy(make(nemo={"batching": "dynamic"}))["dynamic_batching"]
    assert dynamic["train_mb_tokens"] == dynamic["logprob_mb_tokens"] == 1000


def test_no_learning_rate_of_the_settings_reaches_megatron() -> None:
    """A checkpoint of its optimiser names its groups of parameters by the rate: a run with another could not resume."""
    one, other = (student_policy(make(optimizer={"learning_rate": rate})) for rate in (3e-6, 5e-5))
    assert one["megatron_cfg"] == other["megatron_cfg"]


def test_teacher_policy_is_not_the_students() -> None:
    config = make(
        teacher=EXTERNAL,
        nemo={
            "teacher": {"tensor": 4},
            "policy": {"pretrained_checkpoint": {"format": "megatron_lm", "path": "x"}, "generation": {"top_k": 1}},
        },
    )
    policy = teacher_policy(config)
    assert policy["model_name"] == "some/teacher" and policy["megatron_cfg"]["tensor_model_parallel_size"] == 4
    assert "generation" not in policy and "pretrained_checkpoint" not in policy
    assert policy["max_total_sequence_length"] == 600


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_of_the_repository_are_valid(path: Path) -> None:
    assert load_config(path).engine == "nemo"


def test_there_are_configs() -> None:
    assert CONFIGS
