"""The speed of judging: short programs compared with one fresh interpreter per test, and math answers per second.

    python bench/verifiers.py [--workers 2] [--rounds 8]

Both sides judge the same programs on the same tests with the same number of processes at once, in one run, and must
agree on every verdict. The fresh interpreters have no sandbox and no limits but a timeout, which flatters them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.verifiers.code import same_text
from mopd_nemo.verifiers.pool import VerifierPool
from mopd_nemo.verifiers.sandbox.inside.rules import PRELUDE

TESTS_PER_PROGRAM = 20

PROGRAMS: list[tuple[str, Callable[[int], tuple[str, str]]]] = [
    ("print(int(input()) * 2)", lambda n: (f"{n}\n", f"{2 * n}")),
    (
        "import sys\ndata = list(map(int, sys.stdin.read().split()))\nprint(sum(data[1:]))",
        lambda n: (f"3\n{n} {n} 1\n", f"{2 * n + 1}"),
    ),
    (
        "from collections import Counter\ns = input()\nc = Counter(s)\nprint(max(c.values()))",
        lambda n: ("ab" + "c" * n, str(max(n, 1))),
    ),
    (
        "import heapq\nn, k = map(int, input().split())\nh = list(range(n))\nheapq.heapify(h)\n"
        "for _ in range(k): heapq.heappop(h)\nprint(h[0])",
        lambda n: (f"{n + 50} {n}\n", str(n)),
    ),
    (
        "n = int(input())\nsieve = [True] * (n + 1)\nfor i in range(2, int(n**.5) + 1):\n"
        "    if sieve[i]:\n        for j in range(i * i, n + 1, i): sieve[j] = False\nprint(sum(sieve[2:]))",
        lambda n: (f"{1000}\n", "168"),
    ),
    ("n = int(input())\nprint(n + 1 if n != 7 else 0)", lambda n: (f"{n}\n", f"{n + 1}")),  # wrong on the eighth test
]

ANSWERS = [
    (r"\frac{1}{2}", "0.5"), ("12", "12"), (r"2\sqrt{2}", r"\sqrt{8}"), ("(x+1)^2", "x^2+2x+1"), ("7", "8"),
    (r"\frac{\pi}{4}", r"\frac{\pi}{3}"), ("[0,1)", "[0, 1)"), (r"\{1,2\}", r"\{2,1\}"), ("1,000", "1000"),
    ("204", "240"),
]  # fmt: skip


def tests_of(make: Callable[[int], tuple[str, str]]) -> dict[str, Any]:
    pairs = [make(n) for n in range(TESTS_PER_PROGRAM)]
    return {"inputs": [text for text, _ in pairs], "outputs": [text for _, text in pairs], "fn_name": None}


def in_fresh_interpreters(source: str, tests: dict[str, Any]) -> bool:
    """The way of most harnesses: a new interpreter for every test of a program, until one fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(source)
        file.flush()
        for text, expected in zip(tests["inputs"], tests["outputs"], strict=True):
            done = subprocess.run([sys.executable, file.name], input=text, capture_output=True, text=True, timeout=6)
            if done.returncode != 0 or not same_text(done.stdout, expected):
                return False
    return True


def bench_code(workers: int, rounds: int) -> None:
    """The sides take turns, round by round, so that other load on the machine meets all of them."""
    jobs = [(source, tests_of(make)) for source, make in PROGRAMS]
    with VerifierPool(VerifierConfig(workers=workers), ["code"]) as pool, ThreadPoolExecutor(workers) as threads:

        def ours() -> list[bool]:
            futures = [pool.submit("code", f"```python\n{source}\n```", tests) for source, tests in jobs]
            return [future.result().reward == 1.0 for future in futures]

        def fresh(prelude: str) -> list[bool]:
            return list(threads.map(lambda job: in_fresh_interpreters(prelude + job[0], job[1]), jobs))

        sides: dict[str, Callable[[], list[bool]]] = {
            "sandbox, warm workers": ours,
            "fresh interpreters, LiveCodeBench's imports": lambda: fresh(PRELUDE),
            "fresh interpreters, bare": lambda: fresh(""),
        }
        ours()  # every worker has started
        print(
            f"{len(jobs)} programs x {rounds} rounds, {TESTS_PER_PROGRAM} tests each, {workers} at once, {pool.sandbox}"
        )
        seconds = dict.fromkeys(sides, 0.0)
        for _ in range(rounds):
            verdicts = []
            for name, judge in sides.items():
                started = time.perf_counter()
                verdicts.append(judge())
                seconds[name] += time.perf_counter() - started
            assert verdicts[0] == verdicts[1] == verdicts[2], "the sides disagree"
    base = seconds["sandbox, warm workers"]
    for name, total in seconds.items():
        ratio = "" if total == base else f"   ratio {total / base:5.1f}"
        print(f"{name:44} {len(jobs) * rounds / total:8.1f} programs/s{ratio}")


def bench_math(workers: int, rounds: int) -> None:
    jobs = ANSWERS * rounds * 20
    with VerifierPool(VerifierConfig(workers=workers), ["math"]) as pool:

        def judge() -> None:
            for future in [pool.submit("math", rf"\boxed{{{found}}}", gold) for gold, found in jobs]:
                future.result()

        judge()
        started = time.perf_counter()
        judge()
        seconds = time.perf_counter() - started
    print(f"{'math answers, 2 of 10 by text alone':44} {len(jobs) / seconds:8.1f} answers/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {Path(sys.executable).resolve()}")
    bench_code(arguments.workers, arguments.rounds)
    bench_math(arguments.workers, arguments.rounds)


if __name__ == "__main__":
    main()
