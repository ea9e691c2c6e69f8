"""Problems: the built-in arithmetic task, JSONL files, and the benchmarks that become JSONL files."""

from __future__ import annotations

from typing import Literal

from mopd_nemo.config import Config
from mopd_nemo.data.arithmetic import SIZES, make_problems
from mopd_nemo.data.jsonl import read_problems
from mopd_nemo.data.rows import BadRows
from mopd_nemo.types import Problem


def load_problems(config: Config, split: Literal["train", "eval"]) -> list[Problem]:
    """The problems of one split, in a fixed order.

    Raises:
        UserError: the file is missing, empty or malformed.
    """
    source = config.data.train if split == "train" else config.data.eval
    limit = config.data.num_train if split == "train" else config.data.num_eval
    if source == "arithmetic":
        return make_problems(split, min(limit or SIZES[split], SIZES[split]))
    problems = read_problems(source, f"data.{split}", BadRows(config.data.on_bad_row))
    return problems[:limit]
