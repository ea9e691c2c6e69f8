"""The estimate of memory against the peaks of whole steps, from tracked allocations."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu_engine import Sizes, _group, config_of, random_weights, write_model
from bench.peak import Peak
from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.architecture import KNOWN, Architecture
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local import memory
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.memory import shortage
from mopd_nemo.losses import token_loss
from mopd_nemo.methods.base import make_method
from mopd_nemo.types import Rollout
from tests.conftest import QUICKSTART

MODEL = Architecture(layers=6, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=1024, tied=True)
WIDE = replace(MODEL, layers=3, hidden=128, head_dim=32, ffn=384, vocab=4096, tied=False)
DEEP = replace(MODEL, layers=12, heads=8, kv_heads=8, ffn=256, vocab=512)
NARROW = ["model.dtype=bfloat16", "optimizer.weights=bfloat16", "optimizer.moments=int8"]
SERVED = ["divergence.support=teacher_topk"]
SIZES = Sizes(model=MODEL, prompts=4, rollouts=4, prompt=24, response=48, micro_batch=512, trees=(), ladder={})


def measured(directory: Path, model: Architecture, sizes: Sizes, overrides: list[str]) -> tuple[dict[str, int], Config]:
    """Peak bytes of each phase of the second of two steps, in which every response is as long as it may be.

    The config has the lengths that prompts and contexts really have for their limits.
    """
    peaks = {}
    with random_weights("cpu"), Peak("cpu") as peak:
        config = config_of(write_model(directory, model), sizes, "cpu", overrides)
        engine = LocalEngine(config)
        engine._eos_ids = frozenset()
        rng = random.Random(0)
        texts = [
            " ".join(f"w{rng.randrange(5, model.vocab)}" for _ in range(sizes.prompt)) for _ in range(sizes.prompts)
        ]
        messages = [({"role": "user", "content": text},) for text in texts]
        prompts = [engine.chat.prompt_ids(turns) for turns in messages]
        request = Request(prompts, sizes.rollouts, Sampling(sizes.response), "memory")
        for _ in range(2):
            peak.restart()
            found: list[list[Rollout]] = engine.generate(request)
            peaks["generate"] = peak.read()
            groups = [_group(n, *whole) for n, whole in enumerate(zip(messages, prompts, found, strict=True))]
            batch = make_method(config, engine.chat).build(groups, 1)
            peak.restart()
            targets, _ = engine.score(batch)
            peaks["score"] = peak.read()
            peak.restart()
            apply = engine._learner._apply

            def at_the_end(rate: float) -> dict[str, float]:
                peaks["update"] = peak.read()
                peak.restart()
                return apply(rate)  # noqa: B023

            engine._learner._apply = at_the_end
            engine.update(batch, targets, 1e-12)
            engine._learner._apply = apply
            peaks["optimiser step"] = peak.read()
            del targets
    contexts = [len(e.teacher_prompt_ids) for e in batch.examples if e.teacher_prompt_ids]
    data = config.data.model_copy(update={"max_prompt_tokens": len(prompts[0])})
    peers = config.peers.model_copy(update={"max_context_tokens": max(contexts, default=1)})
    return peaks, config.model_copy(update={"data": data, "peers": peers})


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        (MODEL, []),
        (MODEL, ["model.dtype=bfloat16", "teacher.kind=live"]),
        (MODEL, ["method=grpo"]),
        (WIDE, ["model.dtype=bfloat16", "train.activation_checkpointing=true"]),
        (WIDE, ["divergence.support=full", "train.tokens_per_micro_batch=4096"]),
        (DEEP, ["train.activation_checkpointing=true", "method=sdpo"]),
        (DEEP, ["lora.rank=4"]),
        (DEEP, ["lora.rank=4", "lora.dropout=0.1"]),
        (WIDE, ["lora.rank=8", "lora.dropout=0.1", "model.dtype=bfloat16"]),
        (WIDE, ["lora.rank=8", "model.dtype=bfloat16", "teacher.kind=frozen"]),
        (WIDE, NARROW),
        (WIDE, [*NARROW, "teacher.offload=true"]),
        (WIDE, [*NARROW, "teacher.kind=live", "train.activation_checkpointing=true"]),
        (DEEP, [NARROW[0], NARROW[1], "teacher.kind=frozen"]),
        (WIDE, [NARROW[2], "method=grpo"]),
        (WIDE, ["reference.kl=0.1", "method=grpo"]),
        (WIDE, ["policy_gradient.weight=0.5"]),
        (WIDE, ["method=dpo"]),
        (WIDE, ["method=simpo", "model.dtype=bfloat16"]),
        (MODEL, ["teacher.offload=true"]),
        (MODEL, ["teacher.offload=true", "model.dtype=bfloat16", "teacher.kind=frozen"]),
        (WIDE, ["teacher.offload=true", "model.dtype=bfloat16"]),
        (WIDE, ["reference.kl=0.1", "reference.offload=true", "method=grpo"]),
        (DEEP, ["divergence.contrast=0.5", "peers.failures=1", "train.tokens_per_micro_batch=200"]),
    ],
    ids=str,
)
def test_estimate_is_within_a_tenth_of_the_peak(tmp_path: Path, model: Architecture, overrides: list[str]) -> None:
    sizes = replace(SIZES, prompts=2, rollouts=8) if model == WIDE else SIZES
    peaks, config = measured(tmp_path, model, sizes, overrides)
    need = memory.estimate(config, model, [], "cpu", 1.0)
    if config.teacher.kind == "none" and not config.reference.kl:
        del peaks["score"]
        assert need["score"] == 0
    on_host = need.phases["update"].get("on the host", 0.0)
    assert on_host * 1e9 == 4 * model.parameters * (config.teacher.offload or config.reference.offload)
    for phase, peak in peaks.items():  # contexts may share more than is known beforehand: scoring may need less
        rel = 0.15 if phase == "score" else 0.1
        device = (need[phase] - on_host) * 1e9  # alone, so that a whole copy there would show
        assert device == pytest.approx(peak - on_host * 1e9, rel=rel), (phase, need.phases[phase])
    assert need.fullest == max(peaks, key=peaks.__getitem__)


def test_constants_of_the_loss_are_its_own() -> None:
    assert memory.LOGITS == token_loss.LOGIT_BUDGET and memory.MIN_CHUNK == token_loss.MIN_CHUNK


def test_arithmetic_of_the_issue() -> None:
    """Qwen3-1.7B in float32 with an EMA: 34 GB before its first activation; Qwen3-8B 164 GB."""
    config = load_config(QUICKSTART)
    for name, gb in (("Qwen/Qwen3-1.7B", 34), ("Qwen/Qwen3-8B", 164)):
        parts = memory.estimate(config, KNOWN[name], [], "cuda", 80.0).phases["update"]
        resident = sum(parts[part] for part in ("weights", "moments", "teacher", "gradients"))
        assert resident == pytest.approx(gb, abs=0.5)
        least = memory.at_least(config, KNOWN[name].parameters)
        assert least.peak == pytest.approx(resident)


def test_what_does_not_fit_is_named_with_its_largest_parts() -> None:
    need = memory.estimate(load_config(QUICKSTART), KNOWN["Qwen/Qwen3-8B"], [], "cuda", 80.0)
    line = shortage(need, 80.0)[0]
    assert line.startswith("generate may need") and "of 80 GB (most: moments 65.5, weights 32.8, teacher 32.8)" in line
    assert shortage(need, 1000.0) == []


def test_a_served_teacher_takes_nothing_here() -> None:
    config = load_config(
        QUICKSTART, ["teacher.kind=server", "teacher.urls=[http://host:8000]", "divergence.support=teacher_topk"]
    )
    need = memory.estimate(config, MODEL, [], "cpu", 1.0)
    assert need["score"] == 0 and "teacher" not in need.phases["update"]


def test_a_cache_grows_last_from_half_its_limit() -> None:
    """Of 2,048 tokens and one place for the prompt: not from 2,048 to 2,049."""
    sizes = [memory.cache_size(1, 2049)]
    while sizes[-1] < 2049:
        sizes.append(memory.cache_size(sizes[-1], 2049))
    assert sizes == [65, 129, 257, 513, 1025, 2049]
    assert [memory.cache_size(1, limit) for limit in (2, 128, 129, 300)] == [2, 128, 65, 75]
