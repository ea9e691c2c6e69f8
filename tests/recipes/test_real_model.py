"""The parts of `make real` that need no download: the problem set, the warm start, whole-or-not-there outputs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mopd_nemo.chat import Chat
from mopd_nemo.config_file import load_config
from mopd_nemo.config_verifiers import VerifierConfig
from mopd_nemo.data.jsonl import read_problems
from mopd_nemo.embedded import embedded_path
from mopd_nemo.engines.local.model import load_tokenizer
from mopd_nemo.errors import UserError
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.pool import VerifierPool
from recipes.real_model import fetch
from recipes.real_model.building import building
from recipes.real_model.families import FAMILIES, problems, tasks
from recipes.real_model.problems import main as write_problems
from recipes.real_model.warm_start import IGNORED, batches, rows

ROOT = Path(__file__).resolve().parents[2]


def test_no_family_stands_in_two_splits():
    seen = [(family.returns, family.expression) for families in FAMILIES.values() for family in families]
    assert len({sentence for sentence, _ in seen}) == len({expression for _, expression in seen}) == len(seen) == 52
    assert len({family.name for families in FAMILIES.values() for family in families}) == 52
