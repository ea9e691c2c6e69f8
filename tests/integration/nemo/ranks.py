"""Run a function with NeMo-RL and Megatron on several processes and collect what each returns. Used by tests only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.integration.nemo import cpu
from tests.ranks import spawn


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(*args)` on every rank; results by rank."""
    return spawn(world, partial(_prepared, function, args))


def _prepared(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    cpu.prepare()
    return function(*args)
