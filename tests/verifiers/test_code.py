"""Programs judged by LiveCodeBench's rules, on every layer that this machine offers."""

import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from mopd_nemo.config.verifiers import CodeConfig, FeedbackConfig, VerifierConfig
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers import code
from mopd_nemo.verifiers.base import AnswerError
from mopd_nemo.verifiers.code import CodeVerifier, HiddenTests, last_block, longest_block
from mopd_nemo.verifiers.sandbox.layers import LayerName

DOUBLE = {"inputs": ["2\n", "21\n"], "outputs": ["4\n", "42\n"]}
PAIRS = {"inputs": ['[1, 2, 3]\n"a b"', '[]\n""'], "outputs": ["[6, 3]", "[0, 0]"], "fn_name": "pair"}


def make(layer: LayerName, mode: Literal["official", "paper"], reveal: bool = False) -> CodeVerifier:
    code = CodeConfig(mode=mode, sandbox=layer, seconds_per_test=2.0, memory_mb=512, output_mb=1)
    return CodeVerifier(VerifierConfig(code=code, feedback=FeedbackConfig(reveal_gold=reveal)))


@pytest.fixture(scope="module")
def official(layer: LayerName) -> Iterator[CodeVerifier]:
    verifier = make(layer, "official")
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def paper(layer: LayerName) -> Iterator[CodeVerifier]:
    verifier = make(layer, "paper")
    yield verifier
    verifier.close()


def judge(verifier: CodeVerifier, source: str, answer: Any = DOUBLE, finished: bool = True) -> Verdict:
    return verifier.judge(f"Let me think.\n```python\n{source}\n```\nDone.", answer, finished)


RIGHT = {
    "plain": "print(int(input()) * 2)",
    "main guard": "def main():\n    print(int(input()) * 2)\nif __name__ == '__main__':\n    main()",
    "names of the prelude": "q = deque([int(input())])\nprint(q[0] * 2, gcd(4, 6) * '')",
    "caught exceptions": (
        "total = 0\nwhile True:\n    try: total += int(input()) * 2\n    except EOFError: break\nprint(total)"
    ),
    "binary stdin": "import sys\nprint(int(sys.stdin.buffer.readline()) * 2)",
    "open(0)": "print(int(open(0).read()) * 2)",
    "dev stdin": "print(int(open('/dev/stdin').read()) * 2)",
    "dev fd": "print(int(open('/dev/fd/0').read()) * 2)",
    "dev stdout": "n = int(input())\nwith open('/dev/stdout', 'w') as out: print(n * 2, file=out)",
    "dev stderr": "import sys\nprint('debug', file=open('/dev/stderr', 'w'))\nprint(int(input()) * 2)",
    "dev null": "import sys\nprint('debug', file=open('/dev/null', 'w'))\nprint(int(input()) * 2)",
    "long integers": "n = int(input())\ntext = str(10 ** 20_000 + n)\nprint(int(text) % 1000 * 2)",
    "iterated stdin": "import sys\nfor line in sys.stdin: print(int(line) * 2)",
    "iterated fileinput": "import fileinput\nfor line in fileinput.input(): print(int(line) * 2)",
    "input, then the rest": "import sys\nn = input()\nassert sys.stdin.read() == ''\nprint(int(n) * 2)",
    "readline, then lines": "import sys\nn = sys.stdin.readline()\nassert not sys.stdin.readlines()\nprint(int(n) * 2)",
    "binary lines": "import sys\nprint(int(sys.stdin.buffer.readlines()[0]) * 2)",
    "iterated binary stdin": "import sys\nprint(sum(map(int, sys.stdin.buffer)) * 2)",
    "fdopen": "import os\nprint(int(os.fdopen(0).read()) * 2)",
    "iter(input, '')": "lines = iter(input, '')\nprint(int(next(lines)) * 2)",
    "os.write": "import os\nn = int(input())\nos.write(1, str(n * 2).encode())",
    "print to a file": "import sys\nprint(int(input()) * 2, file=sys.stdout, flush=True)",
    "os._exit": "import os\nprint(int(input()) * 2, flush=True)\nos._exit(0)",
    "no arguments": "import sys\nassert len(sys.argv) == 1\nprint(int(input()) * 2)",
    "global": "n = 0\ndef read():\n    global n\n    n = int(input())\nread()\nprint(n * 2)",
    "guard in the middle": "def f(n): return n * 2\nif __name__ == '__main__': n = int(input())\nprint(f(n))",
    "lambda recursion": "f = lambda n: 0 if n == 0 else 2 + f(n - 1)\nprint(f(int(input())))",
    "os.read": "import os\nprint(int(os.read(0, 100)) * 2)",
    "writes": "import sys\nsys.stdout.buffer.write(str(int(input()) * 2).encode())",
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    n: int\n    @property\n    def double(self):\n"
        "        return self.n * 2\nprint(P(int(input())).double)"
    ),
    "thread": (
        "import sys, threading\nthreading.stack_size(1 << 26)\nsys.setrecursionlimit(10**6)\n"
        "def f(n): return n and f(n - 1) + 2\n"
        "t = threading.Thread(target=lambda: print(f(int(input()))))\nt.start()"
    ),
    "deep recursion": "n = int(input())\ndef f(k): return k and 1 + f(k - 1)\nassert f(20000) == 20000\nprint(n * 2)",
    "exit": "import sys\nprint(int(input()) * 2)\nsys.exit(0)",
    "exit with a status": "print(int(input()) * 2)\nexit(1)",
    "streams of its own": (
        "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
        "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\nprint(int(input()) * 2)"
    ),
    "a wrapper for speed": (
        "import io, os, sys\nclass Out(io.IOBase):\n    def __init__(self): self.buffer = io.BytesIO()\n"
        "    def write(self, s): self.buffer.write(s.encode())\n"
        "    def flush(self):\n        os.write(1, self.buffer.getvalue())\n        self.buffer.truncate(0)\n"
        "sys.stdout = Out()\nprint(int(input()) * 2)"
    ),
    "closed stdout": "import sys\nprint(int(input()) * 2)\nsys.stdout.close()",
    "seeded luck": "import random\nn = int(input())\nassert random.random() < 1\nprint(n * 2)",
    "atexit": "import atexit\nn = int(input())\natexit.register(lambda: print(n * 2))",
    "subclasses and super": (
        "class A:\n    def f(self, n): return n\nclass B(A):\n    @staticmethod\n    def g(): return 2\n"
        "    def f(self, n): return super().f(n) * self.g()\nprint(B().f(int(input())))"
    ),
    "more builtins": (
        "a, b = divmod(int(input()) * 4, 2)\nprint(a, end=getattr('', 'upper')())\nbin(a); type(a); complex(a)"
    ),
    "numpy": "import numpy as np\nprint(int(np.array([int(input())]).sum()) * 2)",
    "a file of its own": "open('f.txt', 'w').write(input())\nprint(int(open('f.txt').read()) * 2)",
    "multiprocessing": (
        "from multiprocessing import Pool\ndef f(n): return n * 2\nif __name__ == '__main__':\n    n = int(input())\n"
        "    with Pool(2) as pool: print(pool.map(f, [n])[0])"
    ),
    "stderr": "import sys\nprint('debug', file=sys.stderr)\nprint(int(input()) * 2)",
    "annotations from the future": (
        "from __future__ import annotations\ndef f(x: Unknown): return x * 2\nprint(f(int(input())))"
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_all_of_python_is_legal(official: CodeVerifier, name: str) -> None:
    verdict = judge(official, RIGHT[name])
    assert (verdict.outcome, verdict.reward) == (Outcome.CORRECT, 1.0), verdict
    assert verdict.details == {"tests": 2, "passed": 2} and verdict.feedback == ""


FUNCTIONS = {
    "function": "def pair(a, b):\n    return [sum(a), len(b)]",
    "class Solution": (
        "class Solution:\n    def pair(self, a: List[int], b: str) -> List[int]:\n        return [sum(a), len(b)]"
    ),
    "tuple": "def pair(a, b): return sum(a), len(b)",
    "float": "def pair(a, b): return [float(sum(a)), len(b)]",
    "numpy value": "import numpy as np\ndef pair(a, b): return [np.int64(sum(a)), len(b)]",
    "prints too": "def pair(a, b):\n    print('debug')\n    return [sum(a), len(b)]",
    "fraction": "from fractions import Fraction\ndef pair(a, b): return [Fraction(2 * sum(a), 2), len(b)]",
    "decimal": "from decimal import Decimal\ndef pair(a, b): return [Decimal(sum(a)), Decimal(len(b)) * 1]",
    "complex": "def pair(a, b): return [complex(sum(a)), len(b) + 0j]",
    "main guard": "def pair(a, b): return [sum(a), len(b)]\nif __name__ == '__main__':\n    raise SystemExit",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods_are_called(official: CodeVerifier, name: str) -> None:
    verdict = judge(official, FUNCTIONS[name], PAIRS)
    assert verdict.outcome is Outcome.CORRECT, verdict


@pytest.mark.parametrize(
    ("source", "answer", "outcome", "feedback"),
    [
        ("print(int(input()) * 3)", DOUBLE, Outcome.WRONG, "Wrong answer on test 1.\nInput:\n2\nYour output:\n6"),
        ("n = int(input())\nprint(4)", DOUBLE, Outcome.WRONG, "Wrong answer on test 2"),
        ("pass", DOUBLE, Outcome.WRONG, "Wrong answer on test 1"),
        ("print(int(input()) / 0)", DOUBLE, Outcome.WRONG, "ZeroDivisionError: division by zero"),
        ("print(int(input()) * 2)\nraise ValueError('late')", DOUBLE, Outcome.WRONG, "ValueError: late"),
        ("def f(:", DOUBLE, Outcome.WRONG, "SyntaxError"),
        ("while True: pass", DOUBLE, Outcome.TIMEOUT, "Time limit of 2 s exceeded on test 1"),
        ("x = bytearray(4 << 30)", DOUBLE, Outcome.WRONG, "MemoryError"),
        ("while True: print('x' * 9999)", DOUBLE, Outcome.WRONG, "Output limit of 1 MiB exceeded"),
        ("def pair(a, b): return [0, 0]", PAIRS, Outcome.WRONG, "Your output:\n[0, 0]"),
        ("def pair(a, b): return [[sum(a)], len(b)]", PAIRS, Outcome.WRONG, "Wrong answer on test 1"),
        ("def pair(a): return 1", PAIRS, Outcome.WRONG, "TypeError"),
        ("def other(a, b): return [sum(a), len(b)]", PAIRS, Outcome.WRONG, "KeyError"),
        ("def pair(a, b): exit()", PAIRS, Outcome.WRONG, "(nothing was returned)"),
    ],
)
def test_wrong_programs_and_what_is_said_of_them(
    official: CodeVerifier, source: str, answer: Any, outcome: Outcome, feedback: str
) -> None:
    verdict = judge(official, source, answer)
    assert (verdict.outcome, verdict.reward) == (outcome, 0.0)
    assert feedback in verdict.feedback


CHEATS = {
    "equal to everything": (
        "class Always:\n    def __eq__(self, other): return True\n    def __repr__(self): return '[6, 3]'\n"
        "def pair(a, b): return Always()"
    ),
    "an int equal to everything": (
        "class Always(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def pair(a, b): return [Always(1), Always(2)]"
    ),
    "a list equal to everything": (
        "class Always(list):\n    def __eq__(self, other): return True\ndef pair(a, b): return Always([1])"
    ),
    "patched json": "import json\njson.dumps = lambda *a, **k: 'true'\ndef pair(a, b): return True",
    "patched comparison": (
        "import builtins, operator\noperator.eq = lambda *a: True\nbuiltins.all = lambda *a: True\n"
        "def pair(a, b): return [1, 1]"
    ),
    "looking for the answer in memory": (
        "import gc\ndef pair(a, b):\n    wanted = '[6' + ', 3]'\n"
        "    for thing in gc.get_objects():\n        try:\n"
        "            if wanted in str(thing)[:10000]: return [6, 3]\n        except Exception: pass\n    return 0"
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pass(official: CodeVerifier, name: str) -> None:
    assert judge(official, CHEATS[name], PAIRS).outcome is Outcome.WRONG
    assert judge(official, FUNCTIONS["function"], PAIRS).outcome is Outcome.CORRECT


VALUES = {
    "Fraction(7, 3)": "from fractions import Fraction\ndef f(n): return Fraction(n, 3)",
    "Decimal('7.5')": "from decimal import Decimal\ndef f(n): return Decimal(n) + Decimal('0.5')",
    "(7+1j)": "def f(n): return n + 1j",
    "(7, {1: 'a'})": "def f(n): return n, {1: 'a'}",
    "<range>": "def f(n): return range(n)",
}


@pytest.mark.parametrize("shown", VALUES)
def test_returned_values_are_compared_by_value_and_shown_as_python_prints_them(
    official: CodeVerifier, shown: str
) -> None:
    verdict = judge(official, VALUES[shown], {"inputs": ["7"], "outputs": ["7"], "fn_name": "f"})
    assert verdict.outcome is Outcome.WRONG
    assert f"Your output:\n{shown}" in verdict.feedback


LONG = "9" * 6_000


@pytest.mark.parametrize(
    ("source", "inputs", "output", "right"),
    [
        ("print(10 ** 6000 - 1)", "", LONG, True),
        ("print(10 ** 6000 - 2)", "", LONG, False),
        ("print(int(input()) + 1)", LONG, "1" + "0" * 6_000, True),
        ("print(10 ** 60_000)", "", "1" + "0" * 60_000, False),
    ],
)
def test_printed_integers_may_have_50_000_digits(
    official: CodeVerifier, source: str, inputs: str, output: str, right: bool
) -> None:
    verdict = judge(official, source, {"inputs": [inputs], "outputs": [output]})
    assert verdict.outcome is (Outcome.CORRECT if right else Outcome.WRONG), verdict


def test_golds_and_returned_integers_may_have_50_000_digits(official: CodeVerifier) -> None:
    tests = {"inputs": [LONG], "outputs": ["1" + "0" * 6_000], "fn_name": "f"}
    assert judge(official, "def f(n): return n + 1", tests).outcome is Outcome.CORRECT
    assert judge(official, "def f(n): return n + 2", tests).outcome is Outcome.WRONG
    with pytest.raises(AnswerError, match="50000 digits"):
        HiddenTests.read({"inputs": ["1"], "outputs": ["1" * 50_001], "fn_name": "f"})


ENDLESS = {
    "in Python": "import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "through C": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return sum(map(f, [n + 1]))\nf(0)",
    "behind a cache": (
        "import sys\nsys.setrecursionlimit(10**7)\nfrom functools import cache\n@cache\n"
        "def f(n): return f(n + 1) + 1\nf(0)"
    ),
    "in a thread": (
        "import sys, threading\nsys.setrecursionlimit(10**9)\nthreading.stack_size(1 << 26)\n"
        "def f(n): return sorted([n], key=lambda m: f(m + 1))\n"
        "t = threading.Thread(target=f, args=(0,))\nt.start()\nt.join()"
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_recursion_is_an_error_and_not_a_timeout(layer: LayerName, name: str) -> None:
    code = CodeConfig(sandbox=layer, seconds_per_test=20.0, memory_mb=128)  # time for a busy machine
    verifier = CodeVerifier(VerifierConfig(code=code))
    verdict = judge(verifier, ENDLESS[name])
    verifier.close()
    assert verdict.outcome is Outcome.WRONG and verdict.details["ending"] in {"error", "memory", "signal 11"}


def test_responses_without_a_program(official: CodeVerifier) -> None:
    for response in ("no code", "```python\nprint(1)"):
        assert official.judge(response, DOUBLE, True).outcome is Outcome.BAD_FORMAT
        assert official.judge(response, DOUBLE, False).outcome is Outcome.TRUNCATED
    assert judge(official, RIGHT["plain"], finished=False).outcome is Outcome.CORRECT


def test_feedback_has_expected_outputs_only_on_request(official: CodeVerifier, layer: LayerName) -> None:
    answer = {"inputs": ["2"], "outputs": ["the-expected-output"]}
    sources = ("print(1)", "1 / 0", "import os; os.abort()")
    for source in sources:
        assert "the-expected-output" not in str(judge(official, source, answer))
    revealing = make(layer, "official", reveal=True)
    for source in sources:
        assert "Expected output:\nthe-expected-output" in judge(revealing, source, answer).feedback
    revealing.close()


def test_long_texts_are_shortened_in_feedback(official: CodeVerifier) -> None:
    verdict = judge(official, "print('y' * 100000)", {"inputs": ["x" * 100000], "outputs": ["z"]})
    assert len(verdict.feedback) <= 2000 and "[...]" in verdict.feedback


def test_the_same_program_gives_the_same_verdict(official: CodeVerifier) -> None:
    source = "import random\nprint(random.random(), hash('text'), set('abcdef'))"
    assert judge(official, source) == judge(official, source)


def test_a_broken_sandbox_is_replaced_and_the_verdict_unchanged(official: CodeVerifier) -> None:
    process = official._sandbox._process
    assert process is not None
    process.kill()
    process.wait()
    assert judge(official, RIGHT["plain"]).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    "name", ["caught exceptions", "binary stdin", "thread", "exit", "more builtins", "subclasses and super", "open(0)"]
)
def test_paper_mode_fails_what_the_papers_code_fails(paper: CodeVerifier, name: str) -> None:
    assert judge(paper, RIGHT[name]).outcome is Outcome.WRONG


def test_paper_mode(paper: CodeVerifier) -> None:
    assert judge(paper, RIGHT["plain"]).outcome is Outcome.CORRECT
    assert judge(paper, "import math\nprint(int(input()) * 2)").outcome is Outcome.CORRECT
    assert judge(paper, "import os\nprint(int(input()) * 2)").outcome is Outcome.WRONG
    ints = {"inputs": ["[1,2]\n3"], "outputs": ["6"], "fn_name": "total"}
    assert judge(paper, "def total(a, b): return sum(a) + b", ints).outcome is Outcome.CORRECT
    assert judge(paper, "def other(a, b): return sum(a) + b", ints).outcome is Outcome.CORRECT
    assert judge(paper, "def total(a, b): return float(sum(a) + b)", ints).outcome is Outcome.WRONG
    # Arguments are split at every space, methods are not looked for.
    assert judge(paper, FUNCTIONS["function"], PAIRS).outcome is Outcome.WRONG
    assert judge(paper, "class Solution:\n    def total(self, a, b): return sum(a) + b", ints).outcome is Outcome.WRONG
    verdict = judge(paper, "n = int(input())\nprint(42)")
    assert (verdict.outcome, verdict.details["passed"]) == (Outcome.WRONG, 1)


def test_many_failed_tests_are_each_run_alone(paper: CodeVerifier) -> None:
    answer = {"inputs": [str(n) for n in range(60)], "outputs": [str(n if n % 2 else -1) for n in range(60)]}
    assert judge(paper, "print(input())", answer).details["passed"] == 30


def test_all_tests_are_run_when_asked_for_and_the_verdict_stays(layer: LayerName, official: CodeVerifier) -> None:
    answer = {"inputs": [str(n) for n in range(4)], "outputs": ["0", "-1", "2", "3"]}
    stopped = judge(official, "print(input())", answer)
    assert (stopped.details["passed"], stopped.details["tests_run"]) == (1, 2)
    code = official._config.code.model_copy(update={"all_tests": True})
    verifier = CodeVerifier(VerifierConfig(code=code))
    whole = judge(verifier, "print(input())", answer)
    verifier.close()
    assert (whole.details["passed"], whole.details["tests_run"]) == (3, 4)
    assert (whole.outcome, whole.reward, whole.feedback) == (stopped.outcome, stopped.reward, stopped.feedback)


def test_extraction() -> None:
    text = "```python\nlong = 'the longest block'\n```\nthen\n```\nshort = 1\n```\nend"
    assert last_block(text) == "short = 1"
    assert longest_block(text) == "long = 'the longest block'\n"
    assert last_block("```python\nx") is None and longest_block("``` python\nx\n```") is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"inputs": [], "outputs": []}, "at least one"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": ["1"]}, "answer.outputs: missing"),
        ({"inputs": [1], "outputs": ["1"]}, r"answer.inputs.0: must be text; write it in quotes"),
        ({"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}, "Expecting value"),
        ("{", "not valid JSON"),
        (None, "answer"),
    ],
)
def test_bad_tests_are_refused(answer: Any, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        HiddenTests.read(answer)


COLLIDING = """
import os
def find(n):
    numbers = ", ".join(str(k * (2 ** 61 - 1)) for k in range(40_000))
    os.write(3, ('{"set": [' + numbers + "]}").encode())
    os._exit(0)
"""


def test_a_program_that_stalls_the_comparison_is_wrong(official: CodeVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of equal hash, in a set: a wrong program must not escape its verdict."""
    monkeypatch.setattr(code, "_COMPARING_SECONDS", 0.3)
    started = time.process_time()
    verdict = judge(official, COLLIDING, {"inputs": ["1", "2"], "outputs": ["2", "4"], "fn_name": "find"})
    assert (verdict.outcome, verdict.reward) == (Outcome.WRONG, 0.0)
    assert "not compared with the expected output within 0.3 s" in verdict.details["undecided"]
    assert "takes too long to compare" in verdict.feedback
    assert time.process_time() - started < 5.0
    assert judge(official, "print(int(input()) * 2)").outcome is Outcome.CORRECT


def test_numbers_that_a_program_forges_are_not_computed(official: CodeVerifier) -> None:
    started = time.process_time()
    for forged in ('{"fraction": ["1e999999999", 1]}', '{"fraction": ["1e999999999"]}', '{"decimal": "1e999999999"}'):
        source = f"import os\ndef find(n):\n    os.write(3, {forged.encode()!r})\n    os._exit(0)"
        assert judge(official, source, {"inputs": ["1"], "outputs": ["2"], "fn_name": "find"}).outcome is Outcome.WRONG
    assert time.process_time() - started < 5.0


def test_output_that_is_no_text_is_wrong_at_once(official: CodeVerifier) -> None:
    verdict = judge(official, "import os\nos.write(1, b'4\\n\\n' + b'\\n' * 5000 + b'\\xff')")
    assert verdict.outcome is Outcome.WRONG and "no text: it is not UTF-8" in verdict.feedback
