"""What one GPU does, in parts that end on their own failure: `bench/gpu.sh` runs them all within nine minutes.

    python bench/gpu.py PART --out DIR      # tests, losses, attention, step or fits: writes DIR/PART.jsonl
    python bench/gpu.py table --out DIR     # one table of all parts, and DIR/gpu.json

Every row is written as soon as it is measured, so a part that is stopped keeps what it has. `--toy` runs the same at
sizes for a CPU.

Share of the peak: floating-point operations that the work needs at least (bench/cost.py; every shared prefix once),
over the seconds and the card's dense bfloat16 peak by its data sheet, or for another card and on a CPU over what a
large matrix product reaches here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import gpu_attention, gpu_engine, losses
from bench.gpu_engine import REAL, TOY, Row, timed

ROOT = Path(__file__).parent.parent
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by NVIDIA's data sheets, of the SXM cards."""
LOSSES = "8192x2560x151936"
SECONDS_A_LOSS = 45.0
ENGINE = "tests/engines/local"
TESTS = (
    "tests/losses/test_cuda.py",
    f"{ENGINE}/test_offload.py::test_on_a_gpu_weights_are_in_pinned_memory_and_the_run_is_the_same_to_rounding",
    f"{ENGINE}/test_optimizer.py::test_on_a_gpu_codes_are_the_same_and_a_resume_continues_bit_for_bit",
)


def tests(toy: bool, device: str, out: Path, tell: Callable[[Row], None]) -> None:
    """By pytest: the production loss against the reference, a teacher in host memory against one on the device, and the
    optimiser with 8-bit moments.
    """
    report = out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    environment = os.environ | ({"TRITON_INTERPRET": "0"} if device == "cuda" else {})  # no interpreter

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    seconds, done = timed(device, run)
    row: Row = {"what": "tests/losses/test_cuda.py, test_offload.py", "seconds": seconds}
    if not report.is_file():
        tell(row | {"error": ((done.stdout + done.stderr).strip().splitlines() or ["no output"])[-1]})
        return
    suite = ElementTree.parse(report).getroot()[0]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    found = f"{passed} passed, {counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped"
    tell(row | {"note" if passed == counts["tests"] else "error": found})
    (out / "tests.txt").write_text(done.stdout + done.stderr)


def all_losses(toy: bool, device: str, out: Path, tell: Callable[[Row], None]) -> None:
    """Ours beside Liger, TRL and the four products."""
    size, names = ("64x32x512", [losses.FLOOR, "ours: JSD", losses.PLAIN]) if toy else (LOSSES, [*losses.CONTESTANTS])
    dtype, repeats = ("float32", 1) if device == "cpu" else ("bfloat16", 6)
    tokens, hidden, vocab = map(int, size.split("x"))
    found: dict[str, dict[str, Any]] = {}
    for name, row in losses.measure_all(size, names, device, dtype, None, repeats, SECONDS_A_LOSS):
        found[name] = row
        shown: Row = {"what": f"{name}, {tokens:,} x {hidden:,} x {vocab:,}"}
        if "error" in row:
            tell(shown | {"error": row["error"]})
            continue
        shown |= {"seconds": row["seconds"], "gib": float(row["bytes"]) / 2**30, "flops": 8.0 * tokens * hidden * vocab}
        floor = found.get(losses.FLOOR, {})
        if "seconds" in floor:
            shown["note"] = f"{row['seconds'] / floor['seconds']:.2f} x the four products"
        tell(shown)


def of_engine(part: Callable[..., None]) -> Callable[..., None]:
    def run(toy: bool, device: str, out: Path, tell: Callable[[Row], None]) -> None:
        part(TOY if toy else REAL, device, tell)

    return run


PARTS: dict[str, Callable[[bool, str, Path, Callable[[Row], None]], None]] = {
    "tests": tests,
    "losses": all_losses,
    "attention": of_engine(gpu_attention.attention),
    "step": of_engine(gpu_engine.step),
    "fits": of_engine(gpu_engine.fits),
}


def run_part(name: str, toy: bool, device: str, out: Path) -> None:
    """A part; its rows, and last how it ended, go to OUT/NAME.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (out / f"{name}.jsonl").open("w") as file:

        def tell(row: Row) -> None:
            print(json.dumps({"part": name} | row), file=file, flush=True)
            print(name, {key: value for key, value in row.items() if key != "top"}, flush=True)

        try:
            PARTS[name](toy, device, out, tell)
        except Exception as error:
            tell({"what": name, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"})
            raise
        finally:
            tell({"what": "whole part", "seconds": time.perf_counter() - started, "whole": True})


def table(device: str, out: Path) -> bool:
    """Print one table of all rows and write them; whether every part has run to its end without an error."""
    rows: list[Row] = []
    for name in PARTS:
        file = out / f"{name}.jsonl"
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        if not any(row.get("whole") for row in found):
            found.append({"part": name, "what": name, "error": "stopped at its time limit" if found else "has not run"})
        rows += found
    peak, source = peak_of(device)
    print(f"{losses.device_name(device)}; peak {peak / 1e12:.4g} TFLOP/s {source}\n")
    print("| part | what | seconds | peak GiB | share of peak | |\n|---|---|---|---|---|---|")
    for row in rows:
        if "flops" in row and row.get("seconds"):
            row["share"] = row["flops"] / row["seconds"] / peak
        cells = [
            row["part"],
            row["what"],
            f"{row['seconds']:.4g}" if "seconds" in row else "",
            f"{row['gib']:.4g}" if "gib" in row else "",
            f"{row['share']:.1%}" if "share" in row else "",
            f"**{row['error']}**" if "error" in row else row.get("note", ""),
        ]
        print(f"| {' | '.join(cells)} |")
    for row in rows:
        if "top" in row:
            print(f"\n{row['part']}, {row['what']}:")
            print("\n".join(f"    {line}" for line in row["top"]))
    written = {"device": losses.device_name(device), "peak": peak, "peak_source": source, "rows": rows}
    (out / "gpu.json").write_text(json.dumps(written, indent=1))
    return not any("error" in row for row in rows)


def peak_of(device: str) -> tuple[float, str]:
    """FLOP/s that shares refer to, and where they are from."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        if known := next((peak for card, peak in PEAKS.items() if card in name), None):
            return known, "by the data sheet"
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    x = torch.randn(size, size, device=device, dtype=dtype)
    seconds = min(timed(device, lambda: x @ x)[0] for _ in range(5))
    return 2 * size**3 / seconds, f"by a product of {size:,} x {size:,} here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.toy:
        sys.exit("torch sees no CUDA device here: only --toy runs on a CPU")
    if arguments.part == "table":
        sys.exit(not table(arguments.device, arguments.out))
    run_part(arguments.part, arguments.toy, arguments.device, arguments.out)


if __name__ == "__main__":
    main()
