"""What the process of one test does: run the candidate's source on one input. Nothing here is trusted afterwards."""

import atexit
import builtins
import json
import linecache
import os
import random
import sys
import threading
import traceback
import types

import paper

SOURCE = "solution.py"
RESULT_FD = 3
_RECURSION_LIMIT = 50_000
"""LiveCodeBench's."""
_PRELUDE = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import bisect, builtins, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator, random
import re, statistics, string, sys
"""
"""LiveCodeBench runs every solution behind these imports, so many solutions rely on them."""


def extended_builtins() -> dict:
    """Python's builtins and the names of the prelude, in one dictionary.

    A module that looks names up there sees both, and copies nothing: after a fork every object touched is a page to
    copy.
    """
    names: dict = {}
    exec(_PRELUDE, names)
    del names["__builtins__"]
    return names | vars(builtins)


def run(source: str, function: "str | None", text: str, rules: str, known: dict) -> int:
    """Run the candidate on one input; the exit status: 0 normal end, 1 an uncaught exception.

    Args:
        function: call it with the arguments in `text` and write its value to RESULT_FD; None: `text` is on stdin.
        rules: `official` (all of Python) or `paper` (the restrictions of the paper's code).
        known: the extended builtins.
    """
    _open_streams()
    random.seed(0)  # a verdict must not depend on luck
    if rules == "official":
        sys.setrecursionlimit(_RECURSION_LIMIT)
    status = 0
    try:
        module = types.ModuleType("__main__" if function is None else "solution")
        sys.modules[module.__name__] = module
        module.__dict__.update(paper.namespace() if rules == "paper" else {"__builtins__": known})
        exec(compile(source, SOURCE, "exec"), module.__dict__)
        if function is not None:
            _call(module.__dict__, function, text, rules)
    except BaseException as error:
        # Leaving with an exit status is legal; in the paper's code it fails the test.
        if not isinstance(error, SystemExit) or rules == "paper":
            status = 1
            _report(error, source)
    threading._shutdown()  # type: ignore[attr-defined]  # wait for threads, as the end of an interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _open_streams() -> None:
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape")  # noqa: PTH123, SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape")  # noqa: PTH123, SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: PTH123, SIM115
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1
    )


def _call(module: dict, name: str, text: str, rules: str) -> None:
    value = _find(module, name, rules)(*_arguments(text, rules))
    # Plain data leaves the process, never a verdict: the comparison is made outside.
    encoded = json.dumps(_plain(value)).encode()
    os.write(RESULT_FD, encoded)


def _find(module: dict, name: str, rules: str):  # noqa: ANN202
    if rules == "paper":
        return module[name] if name in module else paper.first_function(module)
    if "Solution" in module:
        return getattr(module["Solution"](), name)
    return module[name]


def _arguments(text: str, rules: str) -> list:
    """One JSON value a line; the paper's code splits at every space."""
    return [json.loads(part) for part in (text.split() if rules == "paper" else text.split("\n"))]


def _plain(value):  # noqa: ANN001, ANN202
    """JSON that keeps apart what `==` keeps apart: tuples, sets, dictionaries and foreign objects are tagged."""
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
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist())
    return {"object": type(value).__name__}


def _report(error: BaseException, source: str) -> None:
    """The traceback, without the frames that are not the candidate's."""
    linecache.cache[SOURCE] = (len(source), None, source.splitlines(keepends=True), SOURCE)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == SOURCE]
    lines = traceback.format_list(own[-3:]) + traceback.format_exception_only(error)
    os.write(2, "".join(lines)[-4000:].encode("utf-8", "backslashreplace"))

