"""Settings that the documentation names exist."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from mopd_nemo.config import Config

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("slurm/*.yaml")])
BLOCKS = [name for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)]
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(BLOCKS)})(?:\.[a-z_0-9]+)+(?![\w*])")
FILES = ("jsonl", "json", "yaml", "md", "py", "csv", "html", "sh", "log")
"""What follows the dot of a file's name."""


def keys_in(text: str) -> set[str]:
    return {key for key in KEY.findall(text) if key.rsplit(".", 1)[1] not in FILES}


def exists(key: str) -> bool:
    block: object = Config()
    for part in key.split("."):
        if isinstance(block, dict):
            return True  # what is inside belongs to another program
        if not isinstance(block, BaseModel) or part not in type(block).model_fields:
            return False
        block = getattr(block, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    unknown = sorted(key for key in keys_in(page.read_text(encoding="utf-8")) if not exists(key))
    assert not unknown, f"{page.name} names settings that do not exist: {', '.join(unknown)}"


def test_a_setting_that_is_gone_would_be_found() -> None:
    text = "`divergence.aggregation: token_mean` and `train.num_steps`, written to eval.jsonl; see nemo.md and data/x"
    assert keys_in(text) == {"divergence.aggregation", "train.num_steps"}
    assert exists("train.num_steps") and exists("nemo.policy.megatron_cfg.x") and exists("peers.templates")
    assert not exists("divergence.aggregation") and not exists("train.num_steps.x")
