"""`bench/gpu.sh`, which waits for a GPU, at sizes for a CPU: every part runs, and none takes the others with it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import PARTS, run_part
from bench.gpu_attention import FORMS, flex_tree
from bench.peak import Peak
from mopd_nemo.engines.local.prefix_tree import build_tree

ROOT = Path(__file__).parents[2]


def script(out: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bench/gpu.sh", "--toy", "--out", str(out), *parts],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_engine_parts_report_every_row(tmp_path: Path) -> None:
    """In this process, because each of the script's starts torch anew."""
    for name in ("attention", "step", "fits"):
        run_part(name, toy=True, device="cpu", out=tmp_path)
    rows = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    named = {row["what"]: row for row in rows}
    for method in ("mopd", "sdpo", "grpo"):
        for mode in ("full", "LoRA, rank 16"):
            assert named[f"{method}, {mode}: update"]["flops"] > 0
    for phase in ("score", "update"):
        padded, tree, flex = (named[f"{phase}, 8 x 8 after 40, {form}"] for form in FORMS)
        assert padded["flops"] == tree["flops"] and padded["gib"] > tree["gib"] and tree["top"]
        assert all(row["distance"] < 1e-5 for row in (padded, tree, flex) if "seconds" in row)
        assert ("seconds" in flex) == (phase == "score")  # torch has no gradients of FlexAttention on a CPU
    assert named["what fits, full"]["note"].startswith("toy-4; toy-12 does not; 0.0")
    assert named["mopd, full, 8 bytes a parameter: update"]["flops"] > 0
    assert named["what fits, full, 8 bytes a parameter"]["gib"] > 0
    assert named["what fits, LoRA, layers computed again"]["note"].startswith("toy-12; ")


def test_flex_attention_sees_what_the_tree_sees() -> None:
    rng = random.Random(0)
    context = [rng.randrange(60) for _ in range(40)]
    inner = [rng.randrange(60) for _ in range(30)]
    rows = [[*context, *middle, *(rng.randrange(60) for _ in range(20))] for middle in (inner, inner, inner, [1], [2])]
    tree, flexed = build_tree(rows, torch.device("cpu")), flex_tree(rows, torch.device("cpu"))
    assert len(tree.ids_S) == 40 + 30 + 3 * 20 + 2 * 21
    query, key, value = (torch.randn(1, heads, len(tree.ids_S), 16) for heads in (4, 2, 2))
    found, expected = (of.attention.attend(query, key, value, 0.25) for of in (flexed, tree))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_script_goes_on_after_a_failure_and_skipped_checks_have_not_passed(tmp_path: Path) -> None:
    found = script(tmp_path, "tests", "losses")
    assert found.returncode == 1, found.stdout
    table = found.stdout
    assert "0 passed, 0 failed, " in table and "skipped**" in table  # no CUDA device here
    assert "ours: JSD, 64 x 32 x 512 |" in table
    assert "| fits | fits |  |  |  | **has not run** |" in table
    written = json.loads((tmp_path / "gpu.json").read_text())
    losses = [row for row in written["rows"] if row["part"] == "losses" and "seconds" in row]
    assert len(losses) == 4 and all(row["share"] > 0 for row in losses if "flops" in row)


def test_a_part_that_fails_or_is_stopped_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import gpu

    def broken(toy, device, out, tell):
        tell({"what": "first", "seconds": 1.0})
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "fits", broken)
    with pytest.raises(RuntimeError):
        run_part("fits", True, "cpu", tmp_path)
    (tmp_path / "step.jsonl").write_text('{"part": "step", "what": "generate", "seconds": 2.0}\n')
    assert not gpu.table("cpu", tmp_path)
    rows = {(row["part"], row["what"]): row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    assert rows["fits", "first"]["seconds"] == 1.0 and "no such kernel" in rows["fits", "fits"]["error"]
    assert rows["step", "step"]["error"] == "stopped at its time limit"
    assert {part for part, _ in rows} == set(PARTS)


def test_peak_counts_what_is_there_at_once() -> None:
    weights = torch.randn(100, 100, requires_grad=True)
    with Peak("cpu") as peak:
        first = torch.zeros(1000)
        del first
        result = (torch.ones(50, 100) @ weights).exp()  # inputs, product, result; exp keeps its result alone
        assert peak.read() == 4 * 3 * 50 * 100
        assert weights.T.dim() == 2  # a view of what was there before
        view = result[:1]
        del result
        peak.restart()
        assert peak.read() == 4 * 2 * 50 * 100  # the view keeps it all
        del view
    with pytest.raises(torch.OutOfMemoryError), Peak("cpu", limit=1000):
        torch.zeros(300)
