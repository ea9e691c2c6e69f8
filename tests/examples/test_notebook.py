"""The notebook runs, and shows what its text says. Needs the `dev` extra."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "look_at_a_group.ipynb"


def test_notebook_runs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    targets = re.findall(r"target (\d) reads success (\d), success (\d), failure (\d)", text)
    assert len(targets) == 8
    assert all(len(set(indices)) == 4 for indices in targets), "nobody is a peer twice, or of itself"
    assert "A correct solution of this problem:" in text and "A failed attempt" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    moved = re.findall(r"control (\S+) +successes (\S+) nats, failures (\S+) nats", text)
    assert [name for name, *_ in moved] == ["none", "unrelated_prompt"]
    assert float(moved[0][2]) < float(moved[0][1]), "peers lower failures more than successes"
