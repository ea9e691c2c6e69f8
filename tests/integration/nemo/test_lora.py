"""NeMo-RL's real worker with Megatron-Bridge's adapters, from our settings, against the local engine's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integration.nemo.ranks import cut, engine_of, nemo_config, run_ranks
from tests.integration.nemo.test_targets import OBJECTIVES, step

RATE = 1e-2
EPSILON = 1e-5
"""Of Adam: it keeps it smooth where a gradient is all rounding."""
CUTS = {"one rank": cut(1), "packed, tp2": cut(2, tensor=2, packed=True)}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
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
    more = {part: dict(values) for part, values in WAYS[way].items()}
    nemo = CUTS[name] | {"policy": {"megatron_cfg": {"optimizer": {"adam_eps": EPSILON}}}} | more.get("nemo", {})
    return nemo_config(
        lora={"rank": 4, "alpha": 8} | more.get("lora", {}),
        teacher={"kind": "live"},
        optimizer={"weight_decay": 0.0},
        nemo=nemo,
    )


def updated(engine: Any, rate: float = RATE) -> dict[str, float]:
    """Metrics of an update towards a live teacher, which reads another prompt."""
    batch = step(OBJECTIVES["full, jsd"])
    return engine.update(batch, engine.score(batch)[0], rate)


def trained(name: str, directory: Path) -> dict[str, Any]:
    """Each way, three updates with a save before the last."""
    found = {}
    for way in WAYS:
        engine = engine_of(settings(name, way))
        worker = engine._runtime.student.worker
        own: dict[str, Any] = {"before": worker.weights(), "base": worker.exported()}
        own["wants a gradient"] = {key for key, p in worker.model.named_parameters() if p.requires_grad}
        own["optimised"] = sum(p.numel() for group in worker.optimizer.param_groups for p in group["params"])
        own["updates"] = [updated(engine)]
        own |= {"after": worker.weights(), "exported": worker.exported()}
        own["updates"].append(updated(engine))
        policy = directory / way / "policy"
        worker.save_checkpoint(weights_path=str(policy / "weights"), optimizer_path=str(policy / "optimizer"))
        own["updates"].append(updated(engine))
        found[way] = own | {"last": worker.exported()}
    return found


def continued(name: str, directory: Path) -> dict[str, Any]:
    """The third update of each way, from its save."""
    found = {}
    for way in WAYS:
        engine = engine_of(settings(name, way), checkpoint=directory / way)
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


def first_matrices(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The whole A of each of Megatron's layers by its number and name, put together from tensor ranks."""
    whole = {}
    for key in (key for key in found[0]["plain"]["before"] if key.endswith("linear_in.weight")):
        *_, layer, _, name, _, _, _ = key.split(".")
        parts = [rank["plain"]["before"][key] for rank in found]
        whole[f"{layer}.{name}"] = torch.cat(parts, dim=1 if name in CUT_BY_INPUT else 0)
    return whole


def test_an_update_is_the_local_engines_and_a_refit_sends_merged_weights(ranks: Any) -> None:
    """B begins at 0, so A has no gradient yet, and a shared A moves nothing that its copies do not."""
    from mopd_nemo.engines.local.engine import LocalEngine

    name, found = ranks
    engine = LocalEngine(settings(name, "plain").model_copy(update={"engine": "local"}))
    for group in engine._learner.optimizer.param_groups:
        group["eps"] = EPSILON
    base = {key: weight.clone() for key, weight in engine.student.sampled_weights()}
    assert found[0]["plain"]["base"].keys() <= base.keys()
    for key, weight in found[0]["plain"]["base"].items():
        assert torch.equal(weight, base[key]), "B = 0: the base"
    with torch.no_grad():
        for place, a_RI in first_matrices(found).items():
            layer, _, own = place.partition(".")
            for key, weight in engine.student.trained().items():
                if f"layers.{layer}." in key and any(f".{one}.lora_A" in key for one in BESIDE[own]):
                    weight.copy_(a_RI)
    expected = updated(engine)
    merged = dict(engine.student.sampled_weights())
    second = updated(engine)
    for own in (rank["plain"] for rank in found):
        for metric in ("loss", "grad_norm", "student/entropy", "teacher/advantage"):
            assert own["updates"][0][metric] == pytest.approx(expected[metric], rel=1e-4), metric
        assert own["updates"][1]["loss"] == pytest.approx(second["loss"], rel=1e-3)
        for key, weight in own["exported"].items():
            torch.testing.assert_close(weight, merged[key], atol=1e-5, rtol=0)
            moved = (weight - base[key]).abs().max()
            assert (moved > 1e-4) == any(f".{one}." in key for layers in BESIDE.values() for one in layers), key


def test_dropout_is_of_updates_and_is_the_same_when_computed_again(ranks: Any) -> None:
    _, found = ranks
    for rank in found:
        plain, dropping, again = (rank[way]["updates"] for way in WAYS)
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
