"""`mopd verify` and `mopd data` as a person types them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mopd_nemo.cli import app, main
from mopd_nemo.verifiers.sandbox.layers import LayerName
from tests.verifiers.conftest import best_layer  # noqa: F401

runner = CliRunner()


def verify(tmp_path: Path, task: str, rows: list[Any], *options: str) -> tuple[int, list[dict[str, Any]], str]:
    source, output = tmp_path / "in.jsonl", tmp_path / "out" / "verdicts.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["verify", "--task", task, "--input", str(source), "--output", str(output), *options]
    result = runner.invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return (
        result.exit_code,
        [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()],
        result.output,
    )


def test_choice(tmp_path: Path) -> None:
    rows = [{"id": n, "response": f"<answer>{'AB'[n % 2]}</answer>", "answer": "A"} for n in range(700)]
    code, verdicts, output = verify(tmp_path, "choice", rows)
    assert code == 0 and [row["id"] for row in verdicts] == list(range(700))
    assert [row["reward"] for row in verdicts] == [1.0, 0.0] * 350
    assert set(verdicts[0]) == {"id", "reward", "outcome", "feedback", "seconds"}
    assert "350 correct, 350 wrong" in output and not (tmp_path / "out" / "verdicts.jsonl.tmp").exists()


def test_math_takes_workers_and_writes_feedback_on_request(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "response": r"\boxed{\frac{2}{4}}", "answer": "0.5"},
        {"id": "b", "response": r"\boxed{3}", "answer": "work #### 4"},
        {"id": "c", "response": "I think", "answer": "4", "finished": False},
    ]
    code, verdicts, _ = verify(tmp_path, "math", rows, "--workers", "1", "--feedback")
    assert code == 0
    assert [(row["id"], row["outcome"]) for row in verdicts] == [("a", "correct"), ("b", "wrong"), ("c", "truncated")]
    assert [bool(row["feedback"]) for row in verdicts] == [False, True, True]
    assert verdicts[0]["seconds"] > 0
    _, quiet, _ = verify(tmp_path, "math", rows, "--workers", "1")
    assert not any(row["feedback"] for row in quiet)


def test_tool(tmp_path: Path) -> None:
    answer = '[{"Action": "f", "Action_Input": "{\\"a\\": 1}"}]'
    rows = [
        {"id": 1, "response": 'Action: f\nAction Input: {"a": 1}', "answer": answer},
        {"id": 2, "response": 'Action: f\nAction Input: {"a": 2}', "answer": json.loads(answer)},
    ]
    code, verdicts, _ = verify(tmp_path, "tool", rows)
    assert code == 0 and [row["reward"] for row in verdicts] == [1.0, 0.0]


def test_code(tmp_path: Path, best_layer: LayerName) -> None:  # noqa: F811
    tests = {"inputs": ["1", "2"], "outputs": ["2", "4"], "fn_name": None}
    function = {"inputs": ["1", "2"], "outputs": ["2", "4"], "fn_name": "f"}
    rows = [
        {"id": 1, "response": "```python\nprint(int(input()) * 2)\n```", "tests": tests},
        {"id": 2, "response": "```python\nprint(2)\n```", "tests": tests},
        {"id": 3, "response": "```python\ndef f(n): return n * 2\n```", "tests": function},
        {"id": 4, "response": "```python\nwhile True: pass\n```", "tests": tests},
    ]
    settings = [f"verifier.code.sandbox={best_layer}", "verifier.code.seconds_per_test=1"]
    code, verdicts, output = verify(tmp_path, "code", rows, "--feedback", "--workers", "2", *settings)
    assert code == 0
    assert [row["outcome"] for row in verdicts] == ["correct", "wrong", "correct", "timeout"]
    assert f"programs run in the sandbox {best_layer}" in output
    assert "Wrong answer on test 2" in verdicts[1]["feedback"] and "4" not in verdicts[1]["feedback"]


def test_bad_rows_are_reported_and_lose_no_others(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "response": "<answer>A</answer>", "answer": "A"},
        "{not json",
        {"id": 3, "answer": "A"},
        {"id": 4, "response": "<answer>A</answer>"},
        {"id": 5, "response": "<answer>A</answer>", "answer": "Paris"},
        "[]",
        {"id": 7, "response": "<answer>B</answer>", "answer": "A"},
    ]
    code, verdicts, output = verify(tmp_path, "choice", rows)
    assert code == 1
    assert [row["id"] for row in verdicts] == [1, None, 3, 4, 5, None, 7]
    assert [row["outcome"] for row in verdicts] == ["correct", *["verifier_error"] * 5, "wrong"]
    assert [row["reward"] for row in verdicts] == [1.0, *[None] * 5, 0.0]
    for where in ("line 2: not valid JSON", "line 3: response: missing", "line 4: answer: missing",
                  "line 5: answer='Paris'", "line 6: "):  # fmt: skip
        assert f"in.jsonl, {where}" in output
    assert "line 3" in verdicts[2]["error"]


def test_an_answer_that_cannot_be_decided_is_wrong_where_the_gold_answer_is_sound(tmp_path: Path) -> None:
    endless = "9^{9^{9^{9^{9}}}}"
    rows = [
        {"id": 1, "response": rf"\boxed{{{endless}}}", "answer": "4"},
        {"id": 2, "response": r"\boxed{4}", "answer": "4"},
    ]
    settings = ("--workers", "1", "verifier.math.seconds_per_answer=0.5")
    code, verdicts, _ = verify(tmp_path, "math", rows, *settings)
    assert (code, [row["outcome"] for row in verdicts]) == (0, ["wrong", "correct"])
    code, verdicts, output = verify(
        tmp_path, "math", [{"id": 3, "response": r"\boxed{4}", "answer": endless}], *settings
    )
    assert (code, verdicts[0]["reward"], verdicts[0]["outcome"]) == (1, None, "verifier_error")
    assert "not decided within 0.5 s" in verdicts[0]["error"] and endless in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["verify", "--task", "poetry", "-i", "x", "-o", "y"],
            "--task=poetry: choose arithmetic, choice",
        ),
        (["verify", "--task", "math", "-i", "nowhere", "-o", "y"], "--input nowhere: no such file"),
        (["verify", "--task", "math", "-i", "x", "-o", "y", "verifier.wrkers=2"], "did you mean verifier.workers"),
        (["data", "prepare", "gsm9k", "-o", "x"], "gsm9k: no such data source"),
        (["data", "prepare", "gsm8k", "-o", "x", "-i", "a", "--revision", "b"], "have no revision"),
        (["data", "prepare", "toolalpaca", "-o", "x"], "download train.json and test.json"),
    ],
)
def test_bad_input_ends_with_its_message_and_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mopd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_data_prepare_writes_splits_and_where_they_are_from(tmp_path: Path) -> None:
    rows = [{"problem": "p", "answer": 1}, {"problem": "q"}, {"problem": "r", "answer": "2"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["data", "prepare", "aime2024", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")]
    result = runner.invoke(app, [*arguments, "--on-bad-row", "skip"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "2 problems" in result.output and "1 malformed rows left out" in result.output
    written = [json.loads(line) for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines()]
    assert [(row["id"], row["task"], row["answer"]) for row in written] == [
        ("aime2024/all/0", "math", "1"), ("aime2024/all/1", "math", "2"),
    ]  # fmt: skip
    record = json.loads((tmp_path / "out" / "source.json").read_text())
    assert record["problems"] == {"eval": 2} and record["skipped_rows"] == 1 and record["files"] == ["in.jsonl"]


def test_data_list_names_every_source() -> None:
    from mopd_nemo.data.sources import SOURCES

    output = runner.invoke(app, ["data", "list"], env={"COLUMNS": "200"}).output
    assert all(name in output for name in SOURCES)
