"""The house rules that a machine can check: one-way dependencies, small files, no engine outside its room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mopd_nemo"
FILES = sorted(PACKAGE.rglob("*.py"))

ROOMS_ABOVE = {
    "types": {"data", "verifiers", "peers", "losses", "methods", "engines", "evaluation", "analysis", "run", "trainer"},
    "data": {"peers", "losses", "methods", "engines", "evaluation", "analysis", "run", "trainer"},
    "verifiers": {"data", "peers", "losses", "methods", "engines", "evaluation", "analysis", "run", "trainer"},
    "peers": {"data", "losses", "methods", "engines", "evaluation", "analysis", "run", "trainer"},
    "losses": {
        "data",
        "verifiers",
        "peers",
        "methods",
        "engines",
        "evaluation",
        "analysis",
        "run",
        "trainer",
        "config",
    },
    "methods": {"engines", "evaluation", "analysis", "run", "trainer"},
    "engines": {"methods", "evaluation", "analysis", "run", "trainer"},
    "run": {"methods", "analysis", "trainer"},
    "slurm": {
        "data",
        "verifiers",
        "peers",
        "losses",
        "methods",
        "engines",
        "evaluation",
        "analysis",
        "run",
        "trainer",
    },
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_dependencies_point_one_way(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = {name for name in imports(file) if not name.startswith("mopd_nemo.methods.batch")}  # what engines read
    used = {name.split(".")[1] for name in names if name.startswith("mopd_nemo.")}
    assert not used & ROOMS_ABOVE.get(room, set())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_cluster_software_stays_in_its_room(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports(file)}
    if "nemo" not in file.relative_to(PACKAGE).parts and file.name != "ray_nodes.py":
        assert not roots & {"nemo_rl", "megatron", "ray"}
    if "engines" not in file.relative_to(PACKAGE).parts:
        assert "vllm" not in roots


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400
