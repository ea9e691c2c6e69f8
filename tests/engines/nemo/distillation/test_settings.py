"""Settings of a NeMo-RL run with peers: what is read from where, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.engines.nemo.distillation.settings import settings_of, vocabulary_of
from tests.conftest import EMBEDDED

MASTER: dict[str, Any] = {
    "policy": {
        "model_name": str(EMBEDDED),
        "precision": "float32",
        "train_global_batch_size": 32,
        "make_sequence_length_divisible_by": 4,
        "megatron_cfg": {"enabled": True},
        "sequence_packing": {"enabled": True, "logprob_mb_tokens": 1100},
        "generation": {"temperature": 1.0, "max_new_tokens": 96},
    },
    "teacher": {
        "model_name": str(EMBEDDED),
        "make_sequence_length_divisible_by": 8,
        "megatron_cfg": {"enabled": True},
        "sequence_packing": {"enabled": True, "logprob_mb_tokens": 1096},
    },
    "data": {"max_input_seq_length": 64},
    "env": {"mopd_arithmetic": {"task": "arithmetic"}},
    "distillation": {
        "num_prompts_per_step": 4,
        "num_generations_per_prompt": 8,
        "max_rollout_turns": 1,
        "topk_logits_k": 20,
        "seed": 7,
    },
    "peer_teacher": {"peers": {"max_context_tokens": 1000, "failures": 3}},
}


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """`MASTER` with other values under dotted keys; None removes one."""
    master = copy.deepcopy(MASTER)
    for key, value in changes:
        *above, last = key.split(".")
        block = master
        for name in above:
            block = block.setdefault(name, {})
        if value is None:
            del block[last]
        else:
            block[last] = value
    return master


def test_what_nemo_rl_has_a_key_for_is_read_from_there() -> None:
    settings = settings_of(MASTER)
    assert (settings.method, settings.teacher.kind, settings.divergence.support) == ("mopd", "ema", "student_topk")
    assert (settings.seed, settings.divergence.k, settings.peers.failures) == (7, 20, 3)
    assert (settings.rollout.num_prompts_per_step, settings.rollout.num_rollouts_per_prompt) == (4, 8)
    assert (settings.data.max_prompt_tokens, settings.rollout.max_response_tokens) == (64, 96)
    assert settings.rollout.importance_clip is None
    assert vocabulary_of(settings) == 428


def test_an_external_teacher_is_the_one_of_nemo_rl() -> None:
    settings = settings_of(changed(("peer_teacher.teacher", {"kind": "external"}), ("teacher.model_name", "other")))
    assert settings.teacher.path == "other"


REFUSED = {
    "no block": ([("peer_teacher", None)], r"^peer_teacher: missing"),
    "unknown section": ([("peer_teacher.peer", {})], r"^unknown key peer_teacher.peer; known here: method, teacher"),
    "unknown key": (
        [("peer_teacher.peers", {"failure": 0})],
        r"unknown key peer_teacher.peers.failure; did you mean peer_teacher.peers.failures\?",
    ),
    "k in two places": ([("peer_teacher.divergence", {"k": 5})], r"divergence.k=5: set distillation.topk_logits_k"),
    "no distillation": ([("peer_teacher.method", "grpo")], r"^peer_teacher.method=grpo: choose one .* mopd, sdpo, opd"),
    "no rollouts": ([("peer_teacher.method", "gkd")], r"^peer_teacher.method=gkd: choose one"),
    "support": (
        [("peer_teacher.divergence", {"support": "full"})],
        r"peer_teacher.divergence.support=full: .* set student_topk or teacher_topk",
    ),
    "one rollout": (
        [("distillation.num_generations_per_prompt", 1)],
        r"distillation.num_generations_per_prompt=1: input should be greater than or equal to 2",
    ),
    "context": (
        [("data.max_input_seq_length", 2000)],
        r"peer_teacher.peers.max_context_tokens=1000 leaves no room .* data.max_input_seq_length=2000",
    ),
    "measured peers": (
        [("peer_teacher.peers", {"max_context_tokens": 1000, "choose": "measured"})],
        r"^peer_teacher.peers.choose=measured: .* set fixed",
    ),
    "turns": ([("distillation.max_rollout_turns", 2)], r"^distillation.max_rollout_turns=2: .* set it to 1"),
    "gym": ([("env.should_use_nemo_gym", True)], r"^env.should_use_nemo_gym=true: .* unset it"),
    "temperature": ([("policy.generation.temperature", 0.7)], r"^policy.generation.temperature=0.7: .* set it to 1.0"),
    "several updates": ([("policy.train_global_batch_size", 16)], r"train_global_batch_size=16: .* = 32"),
    "dtensor": ([("policy.megatron_cfg.enabled", False)], r"^policy.megatron_cfg.enabled=false"),
    "dtensor teacher": (
        [("peer_teacher.teacher", {"kind": "external"}), ("teacher.megatron_cfg.enabled", False)],
        r"^teacher.megatron_cfg.enabled=false",
    ),
    "idle teacher": (
        [("teacher.model_name", "Qwen/Qwen3-14B")],
        r"^teacher.model_name=Qwen/Qwen3-14B is not used: with peer_teacher.teacher.kind=ema .*kind=external",
    ),
    "budget": (
        [("policy.sequence_packing.logprob_mb_tokens", 1095)],
        r"^policy.sequence_packing.logprob_mb_tokens=1095: .* peer_teacher.peers.max_context_tokens=1000 .* 1096",
    ),
    "teacher's budget": (
        [("peer_teacher.teacher", {"kind": "external"}), ("teacher.sequence_packing.logprob_mb_tokens", 1095)],
        r"^teacher.sequence_packing.logprob_mb_tokens=1095",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_go_wrong_is_refused_in_nemo_rl_s_words(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        settings_of(changed(*changes))


def test_a_model_without_the_positions_is_named_by_nemo_rl_s_key() -> None:
    master = changed(
        ("policy.generation.max_new_tokens", 10**6), ("policy.sequence_packing.logprob_mb_tokens", 2 * 10**6)
    )
    with pytest.raises(UserError, match=r"policy.generation.max_new_tokens=1000000 exceeds the .* policy.model_name"):
        vocabulary_of(settings_of(master))
