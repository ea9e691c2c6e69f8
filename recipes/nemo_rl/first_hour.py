"""Results of `first_hour.sh`: the metrics of its runs, their bounds, and the table of points."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

Result = dict[str, Any]


def metric(run: str, key: str, step: str) -> float:
    """A metric of a run's `metrics.jsonl`."""
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return next(float(row[key]) for row in rows if row["step"] == int(step))


def value(run: str, key: str, step: str) -> None:
    print(metric(run, key, step))


def difference(run: str, other: str, key: str, step: str) -> None:
    """Difference of a metric between two runs, relative to the first."""
    first, second = metric(run, key, step), metric(other, key, step)
    print(abs(first - second) / abs(first))


def ratio(run: str, key: str, other: str, step: str) -> None:
    """Ratio of two metrics of a run."""
    print(metric(run, key, step) / metric(run, other, step))


def memory(run: str, used: str) -> None:
    """Peak GPU memory that `nvidia-smi` has seen, relative to the estimate before submission."""
    from mopd_nemo.config.load import load_config
    from mopd_nemo.engines.architecture import KNOWN
    from mopd_nemo.engines.nemo.memory import estimate

    config = load_config(Path(run, "config.yaml"))
    needed = estimate(config, KNOWN[config.model.path], None, 80.0)
    most = max(map(float, Path(used).read_text().split())) * 2**20 / 1e9
    print(most / needed.peak)


def teacher_memory(output: str, *arguments: str) -> None:
    """Start an external teacher beside the student, move it to the GPUs and away again, and write its memory."""
    from mopd_nemo.config.load import load_config
    from mopd_nemo.engines.nemo.engine import NemoEngine
    from mopd_nemo.engines.nemo.launch import launch

    _, config_file, *overrides = arguments  # --config FILE KEY=VALUE...
    config = load_config(config_file, overrides)
    running = launch(config, NemoEngine(config).chat.tokenizer, None)
    teacher: Any = running.teacher
    found = {"at first": _allocated(teacher)}
    running.student.offload_after_refit()
    teacher.prepare_for_lp_inference()
    found["on the GPU"] = _allocated(teacher)
    teacher.offload_after_refit()
    found["after offload"] = _allocated(teacher)
    Path(output).write_text(json.dumps(found))
    running.shutdown()


def _allocated(policy: Any) -> int:
    """Bytes on the fullest GPU of a policy's own tensors."""
    import ray

    return max(ray.get(policy.worker_group.run_all_workers_single_data("__ray_call__", fn=_allocated_here)))


def _allocated_here(_worker: Any) -> int:
    import torch

    return torch.cuda.memory_allocated()


def shared_prompt(output: str, *arguments: str) -> None:
    """Score slices of a text after one prompt, all at once and one by one, and write both."""
    from mopd_nemo.config.load import load_config
    from mopd_nemo.engines.nemo.engine import NemoEngine

    _, config_file, *overrides = arguments  # --config FILE KEY=VALUE...
    engine = NemoEngine(load_config(config_file, overrides))
    text = (Path(__file__).resolve().parents[2] / "docs" / "nemo.md").read_text()
    ids = tuple(engine.chat.tokenizer(text)["input_ids"])
    prompt, rest = ids[:500], ids[500:]
    responses = [rest[start : start + 40 + start // 8] for start in range(0, 2000, 250)]
    once = engine.response_logprobs([prompt] * len(responses), responses)
    alone = [engine.response_logprobs([prompt], [response])[0] for response in responses]
    Path(output).write_text(json.dumps({"once": once, "alone": alone}))


def apart(file: str) -> None:
    """Mean difference of log-probabilities of the same tokens."""
    found = json.loads(Path(file).read_text())
    pairs = [pair for both in zip(found["once"], found["alone"], strict=True) for pair in zip(*both, strict=True)]
    print(sum(abs(first - second) for first, second in pairs) / len(pairs))


def left(file: str) -> None:
    """Bytes that an offload has left on the GPU."""
    found = json.loads(Path(file).read_text())
    print(found["after offload"] / found["on the GPU"])


def record(out: str, name: str, side: str, bound: str, what: str, code: str, found: str) -> None:
    """Print and store whether a point has passed."""
    measured = _number(found) if code == "0" else math.nan
    within = measured < float(bound) if side == "below" else measured > float(bound)
    result = {"point": name, "what": what, "measured": None if math.isnan(measured) else measured}
    result |= {"bound": f"{side} {bound}", "passed": within}
    Path(out, name, "result.json").write_text(json.dumps(result))
    print(f"{'PASS' if within else 'FAIL'}  {name}: {_shown(result)}, {side} {bound}  ({what})", flush=True)


def passed(out: str, name: str) -> None:
    """Exit code 0 if a point has passed before."""
    file = Path(out, name, "result.json")
    sys.exit(0 if file.is_file() and json.loads(file.read_text())["passed"] else 1)


def table(out: str) -> None:
    """Write `table.md` and `table.json`; exit code 1 unless all have passed."""
    files = sorted(Path(out).glob("*/result.json"), key=lambda file: file.stat().st_mtime)
    results = [json.loads(file.read_text()) for file in files]
    Path(out, "table.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = ["| point | measured | bound | | what |", "|---|---|---|---|---|"]
    for row in results:
        verdict = "pass" if row["passed"] else "FAIL"
        lines.append(f"| {row['point']} | {_shown(row)} | {row['bound']} | {verdict} | {row['what']} |")
    Path(out, "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(not all(row["passed"] for row in results))


def _shown(result: Result) -> str:
    return "no value: see its log.txt" if result["measured"] is None else f"{result['measured']:.4g}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


COMMANDS: dict[str, Callable[..., None]] = {
    "value": value,
    "difference": difference,
    "ratio": ratio,
    "memory": memory,
    "teacher-memory": teacher_memory,
    "left": left,
    "shared-prompt": shared_prompt,
    "apart": apart,
    "record": record,
    "passed": passed,
    "table": table,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
