"""The names that a program can use: under the official rules, and under the restrictions of the paper's code.

LiveCodeBench runs every solution after the imports of PRELUDE, and many solutions rely on them. The paper's code lacks
most of Python's builtins, exception classes among them, and many modules. So correct programs fail there;
docs/verifiers.md says how many.
"""

import builtins
import io
import sys
import types
import typing

PRELUDE = """
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
import bisect
import builtins
import collections
import copy
import datetime
import functools
import heapq
import io
import itertools
import json
import math
import operator
import random
import re
import statistics
import string
import sys
"""

_BUILTINS = """
    abs all any bool bytes callable chr dict enumerate filter float format frozenset hash hex input int isinstance
    issubclass iter len list map max min next object ord pow print range repr reversed round set slice sorted str
    sum tuple zip __build_class__
    """.split()  # noqa: SIM905
_IMPORTABLE = frozenset(
    """
    array bisect cmath collections dataclasses datetime decimal fractions functools heapq io itertools json math
    numpy operator random re sortedcontainers statistics string sys time typing
    """.split()  # noqa: SIM905
)

_BLOCKED_EVERYWHERE = """
    ctypes inspect multiprocessing resource socket ssl subprocess threading urllib
    """.split()  # noqa: SIM905
_TYPING = """
    Any Callable DefaultDict Deque Dict FrozenSet Generic Iterable Iterator List Literal Mapping MutableMapping
    MutableSequence MutableSet NoReturn Optional Sequence Set Tuple Type TypeVar TypedDict Union overload
    """.split()  # noqa: SIM905


def extended_builtins() -> dict:
    """Python's builtins and the names of the prelude, in one dictionary.

    A module that has them as its builtins copies nothing. After a fork, touching an object copies a page of memory.
    """
    names: dict = {}
    exec(PRELUDE, names)
    return {name: value for name, value in names.items() if not name.startswith("__")} | vars(builtins)


def paper_namespace() -> dict:
    """A module namespace with the paper's restricted builtins. Also hides this process's modules from the candidate."""
    sys.stdin = io.StringIO(sys.stdin.read())  # no sys.stdin.buffer
    for name in _BLOCKED_EVERYWHERE:
        sys.modules[name] = None  # type: ignore[assignment]
    sys._getframe = None  # type: ignore[assignment]
    names = {name: getattr(builtins, name) for name in _BUILTINS}
    names |= {"open": None, "__import__": _import, "debug_print": lambda *args, **kwargs: None}
    return {"__builtins__": names, **{name: getattr(typing, name) for name in _TYPING}}


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    if name.split(".")[0] not in _IMPORTABLE:
        raise ImportError(f"import of {name!r} is not allowed")
    return builtins.__import__(name, globals, locals, fromlist, level)


def first_function(module: dict):
    """The function to call when the named one does not exist."""
    for value in module.values():
        if isinstance(value, types.FunctionType) and value.__code__.co_filename == "solution.py":
            return value
    raise NameError("no function is defined")
