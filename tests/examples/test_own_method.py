"""A method from outside the package runs by its name alone."""

from pathlib import Path

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import read_rows
from tests.conftest import QUICKSTART
from tests.test_trainer import new_run

OWN = "method=examples.own_method:ShortestSuccess"


def test_it_trains(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", OWN, "train.num_steps=2", "peers.order=canonical", "train.eval_every=0")
    rows = read_rows(run.metrics_file)
    assert len(rows) == 2 and sum(row["examples"] for row in rows) > 0
    assert all(row["loss"] > 0 for row in rows if row["examples"])


def test_it_says_what_it_uses() -> None:
    assert load_config(QUICKSTART, [OWN]).teacher.kind == "ema"
    with pytest.raises(UserError, match=r"divergence.alpha=0.3 is unused by method=examples.own_method"):
        load_config(QUICKSTART, [OWN, "divergence.alpha=0.3"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mopdd", "method=mopdd: choose mopd, sdpo, .* or write module:Name"),
        ("examples.own_methods:X", "there is no module examples.own_methods"),
        ("examples.own_method:X", "module examples.own_method has no X"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(QUICKSTART, [f"method={name}"])
