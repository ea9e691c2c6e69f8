"""NeMo-RL's real worker with Megatron-Bridge's adapters, from our settings, against the local engine's adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mopd_nemo.engines.nemo.policy_config import student_policy
from mopd_nemo.files import write_text
from tests.conftest import EMBEDDED
from tests.integration.nemo import cpu
from tests.integration.nemo.ranks import cut, engine_of, nemo_config, run_ranks
from tests.integration.nemo.test_targets import OBJECTIVES, step

RATE = 1e-2
EPSILON = 1e-5
"""Of Adam: it keeps it smooth where a gradient is all rounding."""
CUTS = {
    "one rank": cut(1),
    "packed, tp2": cut(2, tensor=2, packed=True),
    "packed, tp2, sequence parallel": cut(2, tensor=2, packed=True, sequence=True),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"teacher": {"kind": "ema", "ema_rate": 0.25}},
    "frozen": {"teacher": {"kind": "frozen"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "dropping": {"lora": {"dropout": 0.3}},
    "dropping, computed again": {"lora": {"dropout": 0.3}, "nemo": {"activation_checkpointing": True}},
}
BESIDE = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Layers of Megatron and those of Hugging Face that they hold. One A is for all that a layer holds."""
CUT_BY_INPUT = ("linear_proj", "linear_fc2")
"""Layers of which every tensor rank has some inputs; their A is cut likewise. The A of others is cut by its rows."""


def settings(name: str, way: str) -> Any:
    more = WAYS[way]
    optimizer = {"adam_eps": EPSILON, "use_precision_aware_optimizer": False}  # the latter is Transformer Engine's
    nemo = CUTS[name] | {"policy": {"megatron_cfg": {"optimizer": optimizer}}} | more.get("nemo", {})
    return nemo_config(
        model=more.get("model", {}),
        lora={"rank": 4, "alpha": 8} | more.get("lora", {}),
        teacher=more.get("teacher", {"kind": "live"}),
        optimizer={"weight_decay": 0.0},
        nemo=nemo,
    )


def updated(engine: Any) -> dict[str, float]:
    """Metrics of an update towards a self-teacher, which reads another prompt and then follows."""
    batch = step(OBJECTIVES["full, jsd"])
    metrics = engine.update(batch, engine.score(batch)[0], RATE)
    engine.update_teacher()
    return metrics


def trained(name: str, directory: Path) -> dict[str, Any]:
    """Each way, three updates with a save before the last."""
    found = {}
    for way in WAYS:
        engine = engine_of(settings(name, way))
        worker = engine._runtime.student.worker
        own: dict[str, Any] = {"before": worker.weights(), "base": worker.exported()}
        own["wants a gradient"] = {key for key, p in worker.model.named_parameters() if p.requires_grad}
        own["optimised"] = sum(p.numel() for group in worker.optimizer.param_groups for p in group["params"])
        own["main"] = {p.dtype for group in worker.optimizer.param_groups for p in group["params"]}
        own["updates"] = [updated(engine)]
        own |= {"after": worker.weights(), "exported": worker.exported()}
        own["updates"].append(updated(engine))
        policy = directory / way / "policy"
        worker.save_checkpoint(weights_path=str(policy / "weights"), optimizer_path=str(policy / "optimizer"))
        if worker.rank == 0:
            engine.chat.tokenizer.save_pretrained(policy / "tokenizer")
            write_text(policy / "config.yaml", yaml.safe_dump({"policy": student_policy(settings(name, way))}))
        own["saved"] = worker.exported()
        if "teacher" in WAYS[way]:
            worker.save_teacher(directory=str(directory / way / "teacher"))
        own["updates"].append(updated(engine))
        found[way] = own | {"last": worker.exported()}
    return found


def continued(name: str, directory: Path) -> dict[str, Any]:
    """The third update of each way, from its save."""
    found = {}
    for way in WAYS:
        engine = engine_of(settings(name, way), checkpoint=directory / way)
        engine.load(directory / way)
        found[way] = updated(engine), engine._runtime.student.worker.exported()
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module", params=CUTS)
def ranks(request: pytest.FixtureRequest, directory: Path) -> tuple[str, list[dict[str, Any]]]:
    name = request.param
    return name, run_ranks(trained, CUTS[name]["gpus_per_node"], name, directory / name)


def adapter(key: str) -> bool:
    return ".adapter." in key


def test_only_adapters_are_trained(ranks: Any) -> None:
    _, found = ranks
    for own in (rank["plain"] for rank in found):
        adapters = {key for key in own["before"] if adapter(key)}
        assert own["wants a gradient"] == adapters
        blocks = {key.split(".")[2] for key in own["base"] if key.startswith("model.layers.")}
        assert len(adapters) == 2 * len(BESIDE) * len(blocks), "A and B beside each linear layer"
        assert own["optimised"] == sum(own["before"][key].numel() for key in adapters)
        for key, weight in own["after"].items():
            assert torch.equal(weight, own["before"][key]) == (not key.endswith("linear_out.weight")), key


def first_matrices(tensor_ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole A of each of Megatron's layers by its number and name."""
    whole = {}
    for key in (key for key in tensor_ranks[0] if key.endswith("linear_in.weight")):
        *_, layer, _, name, _, _, _ = key.split(".")
        parts = [weights[key] for weights in tensor_ranks]
        whole[f"{layer}.{name}"] = torch.cat(parts, dim=1 if name in CUT_BY_INPUT else 0)
    return whole


@pytest.mark.parametrize("way", ["plain", "ema", "frozen"])
def test_updates_are_the_local_engines_and_a_refit_sends_merged_weights(ranks: Any, way: str) -> None:
    """B begins at 0, so A has no gradient yet, and a shared A moves nothing that its copies do not."""
    from mopd_nemo.engines.local.engine import LocalEngine

    name, found = ranks
    engine = LocalEngine(settings(name, way).model_copy(update={"engine": "local"}))
    for group in engine._learner.optimizer.param_groups:
        group["eps"] = EPSILON
    base = {key: weight.clone() for key, weight in engine.student.sampled_weights()}
    for key, weight in found[0][way]["base"].items():
        assert torch.equal(weight, base[key]), "B = 0: the base"
    whole = first_matrices([rank[way]["before"] for rank in found])
    with torch.no_grad():
        for model in (engine.student, engine.teacher.model):  # of an EMA, too
            for key, weight in model.named_parameters().items() if model else ():
                for place, a_RI in whole.items():
                    layer, _, own = place.partition(".")
                    if f"layers.{layer}." in key and any(f".{one}.lora_A" in key for one in BESIDE[own]):
                        weight.copy_(a_RI)
    expected = updated(engine)
    merged = dict(engine.student.sampled_weights())
    second = updated(engine)
    for own in (rank[way] for rank in found):
        for metric in ("loss", "grad_norm", "student/entropy", "teacher/advantage"):
            assert own["updates"][0][metric] == pytest.approx(expected[metric], rel=1e-4), metric
        for metric in ("loss", "teacher/advantage", "teacher/entropy"):
            assert own["updates"][1][metric] == pytest.approx(second[metric], rel=1e-3), metric
        for key, weight in own["exported"].items():
            torch.testing.assert_close(weight, merged[key], atol=1e-5, rtol=0)
            moved = (weight - base[key]).abs().max()
            assert (moved > 1e-4) == any(f".{one}." in key for layers in BESIDE.values() for one in layers), key


def test_each_teacher_is_another_after_an_update(ranks: Any) -> None:
    _, found = ranks
    for rank in found:
        first, second = ([rank[way]["updates"][n] for way in ("plain", "ema", "frozen")] for n in range(2))
        assert first[0]["loss"] == first[1]["loss"] == first[2]["loss"], "B = 0: all are the base"
        assert len({metrics["teacher/entropy"] for metrics in second}) == 3
        assert first[2]["teacher/entropy"] == pytest.approx(second[2]["teacher/entropy"], rel=1e-6)


def test_in_bfloat16_the_model_is_narrow_and_what_the_optimiser_moves_is_not(ranks: Any) -> None:
    """B begins at 0 and is the only part of its layer, so bfloat16 loses none of its first steps."""
    _, found = ranks
    for rank in found:
        own, plain = rank["bfloat16"], rank["plain"]
        assert {weight.dtype for weight in own["before"].values()} == {torch.bfloat16}
        assert own["optimised"] == plain["optimised"] and own["main"] == {torch.float32}
        for key, weight in own["base"].items():
            assert torch.equal(weight, plain["base"][key].bfloat16()), "B = 0: the base"
        assert own["updates"][0]["loss"] == pytest.approx(plain["updates"][0]["loss"], rel=0.1)
        for key, weight in own["after"].items():
            assert torch.equal(weight, own["before"][key]) == (not key.endswith("linear_out.weight")), key


def test_dropout_is_of_updates_and_is_the_same_when_computed_again(ranks: Any) -> None:
    _, found = ranks
    for rank in found:
        plain, dropping, again = (rank[way]["updates"] for way in ("plain", *list(WAYS)[-2:]))
        assert again == dropping
        assert dropping[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5), "B = 0: nothing to drop"
        assert dropping[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-3)
        assert dropping[1]["loss"] != pytest.approx(plain[1]["loss"], rel=1e-3)
        assert dropping == found[0]["dropping"]["updates"], "tensor ranks drop the same"


def test_a_checkpoint_continues_exactly(ranks: Any, directory: Path) -> None:
    name, found = ranks
    resumed = run_ranks(continued, CUTS[name]["gpus_per_node"], name, directory / name)
    for rank, own in zip(found, resumed, strict=True):
        for way, (metrics, weights) in own.items():
            wanted = rank[way]
            assert {k: v for k, v in metrics.items() if k != "mfu"} == wanted["updates"][-1], way
            assert all(torch.equal(weight, wanted["last"][key]) for key, weight in weights.items()), way
    saved = sum(file.stat().st_size for file in (directory / name / "plain" / "policy" / "weights").rglob("*.distcp"))
    assert saved < 4 * sum(weight.numel() for weight in found[0]["plain"]["base"].values()) / 2, "without the base"


def test_an_export_is_adapters_or_a_whole_model(ranks: Any, directory: Path, tmp_path: Path) -> None:
    """By NeMo-RL's converter, as `mopd export` calls it: a whole model of one of the cuts, adapters of the others."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, found = ranks
    merge = "sequence" in name
    module = [sys.executable, "-m", "tests.integration.nemo.cpu", "-m", "mopd_nemo.engines.nemo.export"]
    words = [str(directory / name / "plain"), str(tmp_path / "out"), *(["merge"] if merge else [])]
    subprocess.run([*module, *words], check=True, env=os.environ | {"PYTHONPATH": cpu.source_path()})
    loader: Any = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    model = loader.from_pretrained(tmp_path / "out", dtype=torch.float32)
    weights = (model if merge else model.merge_and_unload()).state_dict()
    for key, weight in found[0]["plain"]["saved"].items():
        torch.testing.assert_close(weights[key], weight, atol=1e-6, rtol=0)
    tokenizers: list[Any] = [AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", EMBEDDED)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
