"""The runner: executes the candidate's source on one input after another. Its process is not trusted from then on."""

import atexit
import contextlib
import json
import linecache
import os
import random
import resource
import sys
import threading
import time
import traceback
import types
from collections import deque
from decimal import Decimal
from fractions import Fraction

from rules import first_function, paper_namespace

SOURCE = "solution.py"
FIRST_FD = 20
"""First of the runner's descriptors: stdin, stdout, stderr, value, start, done. The candidate may close 0 to 3."""
_VALUE_FD = 3
_RECURSION_LIMIT = 50_000
"""LiveCodeBench's."""
_INTEGER_DIGITS = 50_000
"""LiveCodeBench's limit of integers read and written. Python's own is 4,300."""


def run_tests(request: dict, known: dict, seconds: float) -> int:
    """Run tests until there are no more, or until one leaves threads or processes behind. Returns the exit status.

    Args:
        request: the program: `source`; `function` to call with the arguments on stdin, its value written to a file, or
            None for a program; `rules`: `official` (all of Python) or `paper` (the restrictions of the paper's code).
        known: the extended builtins.
        seconds: limit of one test.
    """
    cache: dict = {}
    start, done = FIRST_FD + 4, FIRST_FD + 5
    while os.read(start, 1):
        for target in range(4):
            os.dup2(FIRST_FD + target, target)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (min(int(time.process_time() + seconds) + 1, most), most))
        status = _run(request, known, cache)
        if _left_behind():
            return status
        os.write(done, b"1" if status else b"0")
    return 0


def _run(request: dict, known: dict, cache: dict) -> int:
    """One test; 0 normal end, 1 an uncaught exception."""
    source, function, rules = request["source"], request["function"], request["rules"]
    _open_streams()
    sys.argv = [SOURCE]
    random.seed(0)  # verdicts must be reproducible
    if rules == "official":
        sys.setrecursionlimit(_RECURSION_LIMIT)
        sys.set_int_max_str_digits(_INTEGER_DIGITS)
    status = 0
    try:
        module = types.ModuleType("__main__" if function is None else "solution")
        sys.modules[module.__name__] = module
        module.__dict__.update(paper_namespace() if rules == "paper" else {"__builtins__": known})
        if "code" not in cache:
            cache["code"] = compile(source, SOURCE, "exec")
        text = "" if function is None else sys.stdin.read()
        exec(cache["code"], module.__dict__)
        if function is not None:
            _call(module.__dict__, function, text, rules)
    except BaseException as error:
        # Exiting is legal; under the paper's rules it fails the test.
        if not isinstance(error, SystemExit) or rules == "paper":
            status = 1
            _report(error, source)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    streams: list = [sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__]
    for stream in streams:
        with contextlib.suppress(Exception):  # the candidate may have closed or replaced it
            stream.flush()
    return status


def _open_streams() -> None:
    """New stream objects: the last test may have closed, replaced or half filled the old ones."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _left_behind() -> bool:
    """Whether threads or processes of the test are still alive."""
    if threading.active_count() > 1:
        return True
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _call(module: dict, name: str, text: str, rules: str) -> None:
    value = _find(module, name, rules)(*_arguments(text, rules))
    # The process returns data, never a verdict: the comparison is made outside.
    encoded = json.dumps(_plain(value)).encode()
    os.write(_VALUE_FD, encoded)


def _find(module: dict, name: str, rules: str):
    if rules == "paper":
        return module[name] if name in module else first_function(module)
    if "Solution" in module:
        return getattr(module["Solution"](), name)
    return module[name]


def _arguments(text: str, rules: str) -> list:
    """One JSON value per line. The paper's code splits at every space."""
    return [json.loads(part) for part in (text.split() if rules == "paper" else text.split("\n"))]


def _plain(value):
    """JSON with tags for the types that `==` tells apart: tuples, sets, dictionaries, exact numbers, other objects."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_plain(k), _plain(v)] for k, v in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [_plain(item) for item in value]}
    if isinstance(value, Fraction):
        return {"fraction": [int(value.numerator), int(value.denominator)]}
    if isinstance(value, Decimal):
        return {"decimal": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist())
    return {"object": type(value).__name__}


def _report(error: BaseException, source: str) -> None:
    """Write the traceback, with the candidate's own frames only."""
    linecache.cache[SOURCE] = (len(source), None, source.splitlines(keepends=True), SOURCE)
    entries = traceback.walk_tb(error.__traceback__)
    # The last three only: endless recursion leaves millions.
    own = deque((entry for entry in entries if entry[0].f_code.co_filename == SOURCE), maxlen=3)
    lines = traceback.StackSummary.extract(iter(own)).format() + traceback.format_exception_only(error)
    os.write(2, "".join(lines)[-4000:].encode("utf-8", "backslashreplace"))
