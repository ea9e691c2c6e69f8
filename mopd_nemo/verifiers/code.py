"""Task `code`: a program that must pass hidden tests, run in the sandbox.

`official` mode follows LiveCodeBench: the last fenced block is the program; it passes when every test does; the first
failed test decides. `paper` mode follows the paper's code, which is stricter in many ways (docs/verifiers.md).
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mopd_nemo.chat import after_thinking
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.files import reason_of
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.base import AnswerError, Verifier, missing_answer, shorten, with_gold
from mopd_nemo.verifiers.sandbox.client import Program, Run, Sandbox, SandboxError
from mopd_nemo.verifiers.sandbox.layers import choose

_SHOWN_CHARACTERS = 400
_COMPARING_SECONDS = 5.0
"""Of CPU time, so that neighbours do not matter. A comparison takes milliseconds, unless a program has made its output
to stall it, as with numbers of equal hash in a set."""
_INTEGER_DIGITS = 50_000
"""LiveCodeBench's limit."""
_ANY_BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


class HiddenTests(BaseModel):
    """The hidden tests of a problem."""

    model_config = ConfigDict(extra="ignore", strict=True)
    __test__ = False  # not a test case, whatever pytest thinks of the name

    inputs: list[str]
    """Per test: the whole of stdin, or one JSON argument a line."""
    outputs: list[str]
    """Per test: the expected stdout, or the expected value as JSON."""
    fn_name: str | None = None
    """The function, or method of `class Solution`, to call; None: a program that reads stdin."""

    @model_validator(mode="after")
    def _check(self) -> HiddenTests:
        if not self.inputs or len(self.inputs) != len(self.outputs):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.outputs)} outputs: need as many, at least one")
        if self.fn_name is not None:
            for text in (*(line for i in self.inputs for line in i.split("\n")), *self.outputs):
                loads(text)
        return self

    @classmethod
    def read(cls, answer: Any) -> HiddenTests:
        """The tests of a row, itself or as JSON text.

        Raises:
            AnswerError: they are malformed.
        """
        try:
            return cls.model_validate_json(answer) if isinstance(answer, str) else cls.model_validate(answer)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, ("answer", *first["loc"])))
            raise AnswerError(f"{field}: {reason_of(first)}") from error


class _StalledError(Exception):
    """A comparison takes too long."""


class CodeVerifier(Verifier):
    """Runs programs; owns one sandbox."""

    @staticmethod
    def check_answer(answer: Any) -> None:
        HiddenTests.read(answer)

    @staticmethod
    def seconds_to_judge(answer: Any, config: VerifierConfig) -> float:
        # Twice, because a broken sandbox is replaced and the program is run again.
        return 2 * (30.0 + (config.code.seconds_per_test + 6.0) * len(HiddenTests.read(answer).inputs))

    def __init__(self, config: VerifierConfig) -> None:
        super().__init__(config)
        self._sandbox = Sandbox(choose(config.code).launch, config.code)

    @property
    def _all_tests(self) -> bool:
        return self._config.code.all_tests or self._config.code.mode == "paper"

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        tests = HiddenTests.read(answer)
        paper = self._config.code.mode == "paper"
        text = after_thinking(response)
        source = longest_block(text) if paper else last_block(text)
        if source is None:
            return missing_answer("No program was found: put it between ``` and ```.", finished)
        try:
            return self._run(source, tests)
        except SandboxError:
            # A fresh sandbox: if it breaks again, this program is the reason.
            return self._run(source, tests)

    def _run(self, source: str, tests: HiddenTests) -> Verdict:
        with self._sandbox.program(source, tests.fn_name, self._config.code.mode) as program:
            passed, failure = self._first_failure(program, tests)
        details: dict[str, Any] = {"tests": len(tests.inputs), "passed": passed}
        if failure is None:
            return Verdict(1.0, Outcome.CORRECT, details=details)
        number, run = failure
        run_tests = len(tests.inputs) if self._all_tests else number + 1
        details |= {"failed_test": number, "tests_run": run_tests, "ending": run.ending}
        if run.ending == "stalled":
            details["undecided"] = f"not compared with the expected output within {_COMPARING_SECONDS:g} s"
        outcome = Outcome.TIMEOUT if run.ending == "time" else Outcome.WRONG
        return Verdict(0.0, outcome, self._explain(number, run, tests), details)

    def _first_failure(self, program: Program, tests: HiddenTests) -> tuple[int, tuple[int, Run] | None]:
        """How many tests passed, and the first failed one. Unless all are wanted, no test runs after that."""
        passed = 0
        failure: tuple[int, Run] | None = None
        for number, (text, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True)):
            run = self._compared(program.run(text), tests, expected)
            if run.ending not in ("passed", "time", "stalled") and not run.fresh:
                # Earlier tests in the same process may have left traces: only a failure in a fresh one counts.
                run = self._compared(program.run(text, fresh=True), tests, expected)
            if run.ending == "passed":
                passed += 1
                continue
            failure = failure or (number, run)
            if not self._all_tests or run.ending == "stalled":
                break
        return passed, failure

    def _compared(self, run: Run, tests: HiddenTests, expected: str) -> Run:
        """The run with the ending `passed` if its output is the expected one, `stalled` if that cannot be told."""
        if run.ending != "normal":
            return run
        same = _COMPARISONS[self._config.code.mode, tests.fn_name is not None]
        try:
            with _limited():
                equal = same(run.stdout if tests.fn_name is None else run.value, expected)
        except _StalledError:
            return replace(run, ending="stalled")
        return replace(run, ending="passed") if equal else run

    def _explain(self, number: int, run: Run, tests: HiddenTests) -> str:
        """Feedback like an online judge's: the input of the failed test and what the program did."""
        code = self._config.code
        shown = f"Input:\n{shorten(tests.inputs[number].strip(), _SHOWN_CHARACTERS)}"
        match run.ending:
            case "normal":
                got = run.stdout if tests.fn_name is None else _readable(run.value)
                what = f"Wrong answer on test {number + 1}."
                shown += f"\nYour output:\n{shorten(got.strip(), _SHOWN_CHARACTERS)}"
            case "error":
                error = run.stderr.strip() or "The program ended with an error status."
                what = f"Runtime error on test {number + 1}.\n{shorten(error, 2 * _SHOWN_CHARACTERS)}"
            case "time":
                what = f"Time limit of {code.seconds_per_test:g} s exceeded on test {number + 1}."
            case "memory":
                what = f"Memory limit of {code.memory_mb} MiB exceeded on test {number + 1}."
            case "encoding":
                what = f"The output on test {number + 1} is no text: it is not UTF-8."
            case "stalled":
                what = f"The output on test {number + 1} takes too long to compare."
            case "output":
                what = f"Output limit of {code.output_mb} MiB exceeded on test {number + 1}."
            case "processes":
                what = f"Limit of {code.processes} processes exceeded on test {number + 1}."
            case _:
                what = f"The program was killed by {run.ending} on test {number + 1}."
        expected = f"Expected output:\n{shorten(tests.outputs[number].strip(), _SHOWN_CHARACTERS)}"
        return with_gold(f"{what}\n{shown}", expected, self._config.feedback)

    def close(self) -> None:
        self._sandbox.close()


def last_block(response: str) -> str | None:
    """The text between the last two lines with a fence, as LiveCodeBench reads it."""
    lines = response.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    if len(fences) < 2:
        return None
    return "\n".join(lines[fences[-2] + 1 : fences[-1]])


def longest_block(response: str) -> str | None:
    """The longest fenced block, as the paper's code reads it."""
    return max((match[2] for match in _ANY_BLOCK.finditer(response)), key=len, default=None)


def _readable(value: str) -> str:
    """A returned value as Python would print it."""
    if not value:
        return "(nothing was returned)"
    try:
        with _limited():
            return repr(_from_plain(loads(value)))
    except (ValueError, TypeError, ArithmeticError, RecursionError, _StalledError):
        return value


@contextmanager
def _limited() -> Iterator[None]:
    """Raise _StalledError where the block takes too much CPU time.

    The verifier owns its process, so its timer is free. Python acts on the signal between two steps of its own; what is
    done in one step here is short.
    """

    def stop(_number: int, _frame: object) -> None:
        raise _StalledError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _COMPARING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def loads(text: str) -> Any:
    """JSON with integers of up to 50,000 digits. Python's own limit is 4,300, for the whole process.

    Raises:
        ValueError: it is not JSON, or a number is longer.
    """
    return json.loads(text, parse_int=_integer)


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _INTEGER_DIGITS:
        raise ValueError(f"an integer of more than {_INTEGER_DIGITS} digits")
    return int(text) if len(text) <= 4300 else int(Decimal(text))


# Comparison with the expected output: here, outside the sandbox, on plain data.


def same_text(printed: str, expected: str) -> bool:
    """LiveCodeBench's rule for stdout: line by line without outer spaces; lines of numbers compare as numbers."""
    got, want = (text.strip().split("\n") for text in (printed, expected))
    return len(got) == len(want) and all(_same_line(g.strip(), w.strip()) for g, w in zip(got, want, strict=True))


def _same_line(got: str, want: str) -> bool:
    if got == want:
        return True
    tokens, expected = got.split(), want.split()
    if len(tokens) != len(expected):
        return False
    try:
        # Exact decimals: 1.0 is 1, but neighbouring large integers stay apart.
        return [Decimal(token) for token in tokens] == [Decimal(token) for token in expected]
    except InvalidOperation:
        return False


def same_value(value: str, expected: str) -> bool:
    """LiveCodeBench's rule for functions: equal as Python values, where a returned tuple counts as a list."""
    try:
        got = _from_plain(loads(value))
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return False
    if isinstance(got, tuple):
        got = list(got)
    return bool(got == loads(expected))


class _Foreign:
    """An object that is not plain data: equal to nothing."""

    __hash__ = object.__hash__

    def __init__(self, name: str) -> None:
        self._name = name

    def __eq__(self, other: object) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<{self._name}>"


def _from_plain(value: Any) -> Any:
    """Undo the tags that the sandbox puts on types which JSON cannot tell apart."""
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    match tag:
        case "dict":
            return {_from_plain(key): _from_plain(item) for key, item in content}
        case "tuple":
            return tuple(_from_plain(item) for item in content)
        case "set" | "frozenset":
            return {_from_plain(item) for item in content}
        case "fraction":
            above, below = map(int, content)  # of text it would compute 10^exponent in one step
            return Fraction(above, below)
        case "decimal":
            return Decimal(content)
        case "complex":
            return complex(*content)
    return _Foreign(content)


def same_text_in_paper(printed: str, expected: str) -> bool:
    """The paper's code: the whole text, newlines as spaces, character by character."""
    got, want = (text.strip().replace("\n", " ").replace("\r", "") for text in (printed, expected))
    return got == want


def same_value_in_paper(value: str, expected: str) -> bool:
    """The paper's code: equal as sorted JSON, where tuples are lists but 3.0 is not 3."""
    try:
        got = _to_json(_from_plain(json.loads(value)))
        return json.dumps(got, sort_keys=True) == json.dumps(json.loads(expected), sort_keys=True)
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return False


def _to_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    return value


_COMPARISONS: dict[tuple[str, bool], Callable[[str, str], bool]] = {
    ("official", False): same_text,
    ("official", True): same_value,
    ("paper", False): same_text_in_paper,
    ("paper", True): same_value_in_paper,
}
