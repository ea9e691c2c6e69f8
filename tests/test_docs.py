"""What the documentation names exists: settings, files, commands and their options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from mopd_nemo.cli import app
from mopd_nemo.config import Config
from mopd_nemo.config.base import ConfigBlock

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
READABLE = [page for page in PAGES if page.name not in ("configuration.md", "CHANGELOG.md")]
parametrized = pytest.mark.parametrize("page", READABLE, ids=lambda page: str(page.relative_to(ROOT)))


def settings(block: type[ConfigBlock], prefix: str = "") -> set[str]:
    """Dotted keys of a block and of the blocks in it, those of sections included."""
    keys: set[str] = set()
    for name, field in block.model_fields.items():
        keys.add(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, ConfigBlock):
            keys |= settings(field.annotation, f"{prefix}{name}.")
    return keys


THEIRS = {
    "optimized_tp_plans.py",
    "run_distillation.py",
    "examples/converters/convert_megatron_to_hf.py",
    "convert_megatron_to_hf.py",
    "convert_lora_to_hf.py",
}
"""Files of NeMo-RL and Automodel."""
SETTINGS = settings(Config)
SECTIONS = {key.split(".")[0] for key in SETTINGS if "." in key}


def code_of(page: Path) -> list[str]:
    """Inline code and the lines of shell blocks."""
    text = page.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose) + [line for block in blocks for line in block.splitlines()]


@parametrized
def test_settings_exist(page: Path) -> None:
    named = {
        key
        for code in code_of(page)
        for key in re.findall(r"(?<![\w./-])([a-z]\w*(?:\.[a-z]\w*)+)(?=[=: `*,)]|$)", code)
        if key.split(".")[0] in SECTIONS
        and not key.endswith((".py", ".md", ".yaml", ".jsonl", ".json", ".log", ".pt", "_"))
    }
    assert sorted(named - SETTINGS) == []


@parametrized
def test_files_exist(page: Path) -> None:
    folders = "mopd_nemo|tests|recipes|configs|bench|docs|examples|slurm|containers"
    named = {
        path
        for code in code_of(page)
        for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./+{{}},*-]+)", code)
        if not re.search(r"[A-Z]{3}|\{|table-N|/site\.yaml|examples/converters/", path)  # the last: NeMo-RL's
    }
    missing = [path for path in sorted(named) if not any(ROOT.glob(path.rstrip("./") + "*"))]
    assert missing == []
    modules = {name for code in code_of(page) for name in re.findall(r"(?<![\w/.-])[a-z][\w/]*\.py\b", code)}
    assert sorted(name for name in modules - THEIRS if not any(ROOT.glob(f"**/{name}"))) == []


def commands(group: Any, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by the words after `mopd`."""
    found: dict[tuple[str, ...], Any] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, (*words, name))
        else:
            found[*words, name] = command
    return found


WITHOUT_COMMAND = ([], ["--help"], ["--version"], ["--install-completion"], ["data"], ["analyze"], ["config"])
COMMANDS = commands(typer.main.get_command(app))


@parametrized
def test_commands_and_their_options_exist(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    text = re.sub(r"'[^'\n`]*\n[^'\n`]*'", "quoted", text)  # an argument on two lines
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    lines = [*blocks.splitlines(), *re.findall(r"`((?:slurm/submit\.sh|mopd) [^`]+)`", text)]
    for line in lines:
        match = re.search(r"(?:^|[;(] ?|do )(?:mopd|slurm/submit\.sh (?=--)) ?(.*)", line.strip())
        if match is None:
            continue
        words = shlex.split(match[1], comments=True)
        words = ["submit", *words] if "slurm/submit.sh" in line else words
        name = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in COMMANDS), None)
        assert name or words[:1] in WITHOUT_COMMAND, f"{line}: no such command"
        if name:
            known = {
                option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert used <= known | {"--help"}, line


@parametrized
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {word for code in code_of(page) for word in re.findall(r"(?:^|\s)make ([\w./-]+)", code)}
    assert named <= targets


def test_figure_of_the_loop_is_current(tmp_path: Path) -> None:
    script = ROOT / "docs" / "figures" / "loop.py"
    copy = tmp_path / "loop.py"
    copy.write_text(script.read_text())
    subprocess.run([sys.executable, str(copy)], check=True)
    for name in ("loop-light.svg", "loop-dark.svg"):
        assert (tmp_path / name).read_text() == (script.parent / name).read_text(), "python docs/figures/loop.py"


def test_files_named_in_the_claim_table_are_there() -> None:
    text = (ROOT / "docs" / "reproduction.md").read_text()
    names = re.findall(r"`((?:mopd_nemo|configs|recipes)/[\w./-]+\.(?:py|sh|yaml))`", text)
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).is_file()] == []
