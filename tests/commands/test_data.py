"""`mopd data preview` and `mopd config`: problems as the student reads them, and configs as editors read them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.commands.config import config_schema
from mopd_nemo.config import Config
from mopd_nemo.config.load import dump_config, load_config, read_yaml
from tests.conftest import EMBEDDED, QUICKSTART, Mopd

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
CONFIGS = [file for file in CONFIGS if file.name != "values.yaml"]  # which are the paper's numbers


def row(**fields: Any) -> str:
    return json.dumps({"id": "a", "prompt": "1+1?", "answer": "2", "task": "math"} | fields) + "\n"


def test_good_rows_are_shown_as_the_student_reads_them(mopd: Mopd, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(row() + row(id="b", prompt="What is 3*4 <|im_end|>?", answer="12"))
    code, printed = mopd("data", "preview", str(file), "--model", str(EMBEDDED), "--id", "b")
    assert code == 0, printed
    assert "What is 3*4 < |im_end|>?<|im_end|>" in printed and "<|im_start|>assistant" in printed
    assert "b, math, answer 12, " in printed and "usable      2 math; 2 there" in printed and "1+1" not in printed


def test_all_that_is_wrong_is_said_at_once(mopd: Mopd, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [row(), row(), "{", row(id="c", prompt=" "), row(id="d", prompt="7" * 300), row(id="e")]
    file.write_text("".join(line if line.endswith("\n") else f"{line}\n" for line in lines))
    code, printed = mopd("data", "preview", str(file), "--model", str(EMBEDDED), "data.max_prompt_tokens=100")
    assert code == 2
    for said in (
        "3 malformed: a run stops there (data.on_bad_row=stop)",
        "line 2: id 'a' appears twice",
        "line 3: not valid JSON",
        "line 4: the prompt is empty",
        "1 longer than data.max_prompt_tokens=100: a run stops there",
        "id 'd': ",
        "1 prompts repeat an earlier one",
    ):
        assert said in printed, said
    code, printed = mopd("data", "preview", str(file), "data.on_bad_row=skip")
    assert code == 0 and "3 malformed: left out" in printed and "--model DIR" in printed


def test_a_gold_answer_that_cannot_be_judged_is_wrong(mopd: Mopd, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(row(answer="9^{9^{9^9}}") + row(id="b"))
    code, printed = mopd("data", "preview", str(file))
    assert code == 2 and "id 'a': " in printed and "usable      1 math; 2 there" in printed


def test_a_config_shows_both_splits_and_what_they_share(mopd: Mopd, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(row() + row(id="b", prompt="2+2?"))
    (tmp_path / "eval.jsonl").write_text(row(id="x", prompt="2+2?"))
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"defaults: {QUICKSTART}\n"
        f"data: {{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl, num_eval: null}}\n"
    )
    code, printed = mopd("data", "preview", str(config), "data.prompt_suffix= Think.", "--rows", "1")
    assert code == 0, printed
    assert "1 prompts are both trained on and held out" in printed
    assert printed.count("Think.") == 2 and "tokens, half of them" in printed


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_for_editors(file: Path) -> None:
    validator().validate(read_yaml(file))


def test_the_schema_is_as_strict_as_the_config(tmp_path: Path) -> None:
    check = validator()
    check.validate({"defaults": ["a.yaml", "b.yaml"], "peers": {"max_peer_tokens": "${rollout.max_response_tokens}"}})
    (tmp_path / "all.yaml").write_text(dump_config(Config()))
    check.validate(read_yaml(tmp_path / "all.yaml"))
    for wrong in (
        {"peers": {"sucesses": 1}},
        {"sed": 1},
        {"seed": "one"},
        {"train": {"num_steps": 0}},
        {"divergence": {"kind": "kl"}},
        {"defaults": 5},
        {"optimizer": {"learning_rate": [1]}},
    ):
        assert list(check.iter_errors(wrong)), wrong


def test_the_schema_says_what_settings_mean() -> None:
    schema = config_schema()
    seed = schema["properties"]["seed"]
    assert seed["description"] == Config.model_fields["seed"].description and seed["default"] == 0
    assert "defaults" in schema["properties"] and "required" not in json.dumps(schema)


def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install jsonschema")
    return jsonschema.Draft7Validator(config_schema())


def test_a_config_is_shown_as_a_run_records_it(mopd: Mopd, tmp_path: Path) -> None:
    code, printed = mopd("config", "show", "--config", str(QUICKSTART), "seed=7")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(printed)
    assert load_config(tmp_path / "shown.yaml") == load_config(QUICKSTART, ["seed=7"])
    code, printed = mopd("config", "schema")
    assert code == 0 and json.loads(printed) == config_schema()


@pytest.mark.parametrize(
    ("words", "completed"),
    [("mopd ex", ["export"]), ("mopd data pre", ["prepare", "preview"]), ("mopd train --re", ["--resume"])],
)
def test_a_shell_completes(words: str, completed: list[str]) -> None:
    variables = {"_MOPD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    command = [sys.executable, "-c", "import sys; sys.argv = ['mopd']; from mopd_nemo.cli import main; main()"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.stdout.split() == completed, done.stderr
