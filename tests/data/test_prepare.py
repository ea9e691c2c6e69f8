"""Every source, from rows as it publishes them to problems that its verifier accepts."""

import base64
import json
import pickle
import sys
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.data.load import read_problems, write_problems
from mopd_nemo.data.prepare import Prepared, prepare
from mopd_nemo.data.rows import BadRows
from mopd_nemo.data.sources import SOURCES, find_source
from mopd_nemo.types import Problem
from mopd_nemo.verifiers import TASKS, verifier_class


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def prepared(name: str, *inputs: Path, policy: Any = "stop") -> Prepared:
    return prepare(find_source(name), inputs, None, BadRows(policy))


def choice_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "question": f"Question {number}?",
        "choices": {"text": ["yes", "no"], "label": ["A", "B"]},
        "answerKey": "B",
        "type": "mcq-2-choices",
        "domain": "Chemistry",
        "details": {"level": "L3"},
    }
    return row | changes


def pack(tests: list[dict[str, str]]) -> str:
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def code_row(number: int, **changes: Any) -> dict[str, Any]:
    tests = [{"input": f"{i}", "output": f"{i}", "testtype": "stdin"} for i in range(6)]
    row = {
        "question_id": f"q{number:03}",
        "question_content": f"Problem {number}",
        "starter_code": "",
        "contest_date": "2025-03-01T00:00:00",
        "public_test_cases": json.dumps(tests[:2]),
        "private_test_cases": pack(tests[2:]),
        "metadata": "{}",
    }
    return row | changes


# --- real rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"),
    [("biology", "biology"), ("chemistry", "chemistry"), ("physics", "physics"), ("materials", "material")],
)
def test_real_sciknoweval(shared_data: Path, name: str, folder: str) -> None:
    source = find_source(f"sciknoweval-{name}")
    found = prepared(source.name, shared_data / "sciknoweval" / folder)
    evaluated = {repr(p.messages) for p in found.splits["eval"]}
    assert len(found.splits["eval"]) == source.sizes["eval"]
    assert len(found.splits["train"]) + found.repeated == source.sizes["train"]
    assert found.repeated == (1 if name == "materials" else 0)
    assert not any(repr(p.messages) in evaluated for p in found.splits["train"])
    problem = found.splits["eval"][0]
    assert [m["role"] for m in problem.messages] == ["system", "user"] and "\nA: " in problem.messages[1]["content"]


def test_the_papers_split_is_reproduced_from_unsplit_rows(shared_data: Path, tmp_path: Path) -> None:
    """The rows' `idx` is their place before the split, so the real split shows what ours must be."""
    for folder, domain in (("biology", "Biology"), ("chemistry", "Chemistry")):
        rows = []
        real = {}
        for split in ("train", "test"):
            lines = (shared_data / "sciknoweval" / folder / f"{split}.json").read_text(encoding="utf-8").splitlines()
            real[split] = [json.loads(line) for line in lines if line.strip()]
            rows += real[split]
        unsplit = write(tmp_path / f"{domain}.jsonl", sorted(rows, key=lambda row: row["idx"]))
        found = prepared(f"sciknoweval-{folder}", unsplit)
        assert [p.id for p in found.splits["eval"]] == [f"sciknoweval/{folder}/{row['idx']}" for row in real["test"]]
        assert [p.id for p in found.splits["train"]] == [f"sciknoweval/{folder}/{row['idx']}" for row in real["train"]]


def test_real_toolalpaca_in_both_forms(shared_data: Path) -> None:
    rows = prepared("toolalpaca", shared_data / "toolalpaca" / "sdpo_tooluse_test.json").splits["eval"]
    own = prepared("toolalpaca", shared_data / "toolalpaca" / "eval_simulated.json").splits["eval"]
    assert len(rows) == 68 and len(own) == 69
    assert {p.answer for p in rows} <= {p.answer for p in own}
    assert "getRandomAxolotlImage" in own[0].messages[0]["content"]
    assert "random picture of an axolotl" in own[0].messages[0]["content"]


def test_real_gsm8k(shared_data: Path) -> None:
    found = prepared("gsm8k", shared_data / "gsm8k")
    assert {split: len(problems) for split, problems in found.splits.items()} == {"train": 7473, "eval": 1319}
    assert found.splits["eval"][0].answer == "18" and not found.notes
    assert "\\boxed{}" in found.splits["eval"][0].messages[0]["content"]


# --- every source by its published schema -----------------------------------------------------------------------------


def test_sciknoweval_as_on_the_hub(tmp_path: Path) -> None:
    others = [
        choice_row(0, domain="Physics"),
        choice_row(0, details={"level": "L2"}),
        choice_row(0, type="true_or_false", answerKey=""),
    ]
    path = write(tmp_path / "all.jsonl", [*others, *(choice_row(n) for n in range(20))])
    found = prepared("sciknoweval-chemistry", path)
    assert (len(found.splits["train"]), len(found.splits["eval"])) == (18, 2)
    system, question = found.splits["train"][0].messages
    assert "<answer>" in system["content"] and "A: yes\nB: no" in question["content"]
    assert any("1890 were expected" in note for note in found.notes)


def test_livecodebench_paper_split_shares_problems_and_halves_tests(tmp_path: Path) -> None:
    outside = [code_row(90, contest_date="2025-01-31T00:00:00"), code_row(91, contest_date="2025-05-01T00:00:00")]
    found = prepared("livecodebench-paper", write(tmp_path / "test6.jsonl", [*outside, *map(code_row, range(10))]))
    train, evaluated = found.splits["train"], found.splits["eval"]
    assert [p.id for p in train] == [p.id for p in evaluated] == [f"livecodebench/q{n:03}" for n in range(10)]
    for some, every in zip(train, evaluated, strict=True):
        assert every.answer["inputs"] == ["2", "3", "4", "5"]
        assert len(some.answer["inputs"]) == 2 and set(some.answer["inputs"]) < set(every.answer["inputs"])
        assert some.answer["inputs"] == sorted(some.answer["inputs"]) == some.answer["outputs"]
    assert len({tuple(p.answer["inputs"]) for p in train}) > 1
    assert train == prepared("livecodebench-paper", tmp_path / "test6.jsonl").splits["train"]


def test_livecodebench_clean_split_is_disjoint_and_keeps_all_tests(tmp_path: Path) -> None:
    splits = prepared("livecodebench-clean", write(tmp_path / "r.jsonl", [code_row(n) for n in range(9)])).splits
    ids = {split: {p.id for p in problems} for split, problems in splits.items()}
    assert (len(ids["train"]), len(ids["eval"])) == (5, 4) and not ids["train"] & ids["eval"]
    assert all(p.answer["inputs"] == list("012345") for p in splits["eval"])


def test_livecodebench_functions_show_their_signature_and_programs_can_pass(tmp_path: Path) -> None:
    tests = [{"input": '[1, 2]\n"a b"', "output": "3", "testtype": "functional"}]
    row = code_row(
        1,
        starter_code="class Solution:\n    def f(self, a: List[int], b: str) -> int:\n        ",
        metadata=json.dumps({"func_name": "f"}),
        public_test_cases="[]",
        private_test_cases=json.dumps(tests),
    )
    (problem,) = prepared("livecodebench-paper", write(tmp_path / "r.jsonl", [row])).splits["eval"]
    assert "def f(self, a: List[int], b: str) -> int:" in problem.messages[0]["content"]
    assert problem.answer == {"inputs": ['[1, 2]\n"a b"'], "outputs": ["3"], "fn_name": "f"}


def test_a_pickle_that_is_not_text_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(UserError, match="private_test_cases: a pickle that wants"):
        prepared("livecodebench-paper", write(tmp_path / "r.jsonl", [code_row(1, private_test_cases=evil)]))
    assert not (tmp_path / "touched").exists()


def test_deepmath_keeps_the_difficult_ones(tmp_path: Path) -> None:
    rows = [{"question": f"q{d}", "final_answer": "1", "difficulty": d} for d in (5.5, 6, 6.5, 9.0)]
    splits = prepared("deepmath", write(tmp_path / "r.jsonl", rows)).splits
    assert list(splits) == ["train"] and [p.messages[0]["content"][:2] for p in splits["train"]] == ["q6", "q6", "q9"]


@pytest.mark.parametrize("name", ["aime2024", "aime2025", "hmmt-feb-2025", "hmmt-nov-2025"])
def test_competitions_are_for_evaluation(tmp_path: Path, name: str) -> None:
    rows = [{"problem_idx": n, "problem": f"p{n}", "answer": answer} for n, answer in enumerate((204, r"\frac{1}{2}"))]
    splits = prepared(name, write(tmp_path / "r.jsonl", rows)).splits
    assert list(splits) == ["eval"] and [p.answer for p in splits["eval"]] == ["204", r"\frac{1}{2}"]


# --- what goes wrong --------------------------------------------------------------------------------------------------

MALFORMED = {
    "sciknoweval-chemistry": [
        (choice_row(1, answerKey="AB"), "answerKey: 'AB' is not one letter"),
        (choice_row(1, choices={"text": ["a"], "label": []}), "choices: "),
        (choice_row(1, details=None), "details: None"),
        ({"prompt": "q", "system": "s"}, "answer: missing"),
    ],
    "toolalpaca": [
        ({"prompt": "q"}, "answer: missing"),
        ({"prompt": "q", "answer": "[]"}, "a list of calls"),
        ({"prompt": "q", "answer": '[{"Action": "f", "Action_Input": "{"}]'}, "not valid JSON"),
        ({"Name": "api", "Instructions": ["a"], "Golden_Answers": []}, "Golden_Answers: "),
    ],
    "livecodebench-clean": [
        (code_row(1, contest_date="soon"), "contest_date: 'soon' is not a date"),
        (code_row(1, private_test_cases="???"), "private_test_cases: "),
        (code_row(1, public_test_cases="[1]"), "public_test_cases: "),
        (code_row(1, metadata="{"), "metadata: not valid JSON"),
    ],
    "deepmath": [({"question": "q", "final_answer": "1"}, "difficulty: None is not a number")],
    "aime2024": [({"problem": "p", "answer": None}, "answer: None is neither")],
    "gsm8k": [({"question": "q", "answer": "18"}, "answer: does not end in")],
}


@pytest.mark.parametrize(("name", "row", "message"), [(n, *case) for n, cases in MALFORMED.items() for case in cases])
def test_a_malformed_row_is_named_by_file_line_and_field(
    tmp_path: Path, name: str, row: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        prepared(name, path)
    assert "rows.jsonl, line 1: " in str(error.value) and message in str(error.value)


def test_the_good_requests_of_an_api_are_kept_and_every_bad_one_is_counted(tmp_path: Path) -> None:
    call, bad = {"Action": "f", "Action_Input": "{}"}, {"Action": "f", "Action_Input": "{"}
    for golds, kept in (
        ([[call], [bad], [call], [call]], 3),
        ([[bad], [call], [bad], [call]], 2),
        ([[call], "no calls", [], [call]], 2),
        ([[bad], [bad], [bad], [bad]], 0),
    ):
        good = {
            "Name": "Other",
            "Description": "d",
            "NLDocumentation": "n",
            "Instructions": ["x"],
            "Golden_Answers": [[call]],
        }
        api = good | {"Name": "Api", "Instructions": ["a", "b", "c", "d"], "Golden_Answers": golds}
        path = tmp_path / "eval.json"
        path.write_text(json.dumps([api, good]))
        found = prepared("toolalpaca", path, policy="skip")
        assert (len(found.splits["eval"]), found.skipped) == (kept + 1, 4 - kept)
    with pytest.raises(UserError, match=r"row 1 \(Api/0\): .*not valid JSON"):
        prepared("toolalpaca", path)


def test_malformed_rows_can_be_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"problem": "p", "answer": 1}, {"problem": ""}, {"problem": "q", "answer": 2}])
    found = prepared("aime2024", path, policy="skip")
    assert (len(found.splits["eval"]), found.skipped) == (2, 1)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        prepared("gsm8k", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no .json, .jsonl, .parquet file in it"):
        prepared("gsm8k", tmp_path)
    with pytest.raises(UserError, match="none of the rows"):
        prepared("deepmath", write(tmp_path / "r.jsonl", [{"question": "q", "final_answer": "1", "difficulty": 1}]))
    with pytest.raises(UserError, match="no such data source; known: sciknoweval-biology"):
        find_source("gsm9k")
    row = {"idx": 1, "prompt": "q", "answer": '[{"Action": "f", "Action_Input": "{}"}]'}
    twice = write(tmp_path / "twice.jsonl", [row, row])
    with pytest.raises(UserError, match="appears twice in eval"):
        prepared("toolalpaca", twice)


class FakeHub(types.ModuleType):
    """Stands for the `datasets` library."""

    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.asked: list[Any] = []

    def load_dataset(self, repo: str, config: str | None, *, split: str, revision: str) -> Any:
        self.asked.append((repo, config, split, revision))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_the_hub_is_asked_by_real_name_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub([code_row(1), code_row(2)])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert len(prepared("livecodebench-clean").splits["eval"]) == 1
    assert hub.asked == [("livecodebench/code_generation_lite", None, "test", "refs/pr/6")]
    hub.rows = [{"question": "q", "answer": "#### 1"}]
    prepare(find_source("gsm8k"), (), "abc", BadRows("stop"))
    assert hub.asked[1:] == [("openai/gsm8k", "main", "train", "abc"), ("openai/gsm8k", "main", "test", "abc")]


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.hub])
def test_no_network_says_what_to_download_and_where_to_put_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(ConnectionError("Couldn't reach the hub")))
    with pytest.raises(UserError) as error:
        prepared(name)
    text = str(error.value)
    assert SOURCES[name].download in text and f"mopd data prepare {name} --input PATH" in text
    assert "Couldn't reach the hub" in text


def test_without_the_library_or_a_hub_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mopd-nemo\[data\]'"):
        prepared("gsm8k")
    with pytest.raises(UserError, match=r"not on the Hugging Face hub: download train.json"):
        prepared("toolalpaca")


# --- what is written --------------------------------------------------------------------------------------------------


def test_written_problems_are_read_back_and_their_answers_accepted(shared_data: Path, tmp_path: Path) -> None:
    for name, folder in (("gsm8k", "gsm8k"), ("sciknoweval-biology", "sciknoweval/biology")):
        problems = prepared(name, shared_data / folder).splits["eval"]
        write_problems(tmp_path / "p.jsonl", problems)
        assert read_problems(str(tmp_path / "p.jsonl"), "data.eval") == problems


def test_skipping_bad_rows_is_a_setting_of_the_reader(tmp_path: Path) -> None:
    good = Problem("1", ({"role": "user", "content": "q"},), "A", "choice")
    write_problems(tmp_path / "p.jsonl", [good])
    with (tmp_path / "p.jsonl").open("a") as file:
        file.write('{"id": 2, "prompt": "q", "task": "choice", "answer": "Paris"}\n')
    with pytest.raises(UserError, match="line 2: answer='Paris': the answer of a choice is one letter"):
        read_problems(str(tmp_path / "p.jsonl"), "data.train")
    bad = BadRows("skip")
    assert read_problems(str(tmp_path / "p.jsonl"), "data.train", bad) == [good]
    assert sum(bad.skipped.values()) == 1


def test_every_source_names_a_task_that_exists() -> None:
    config = VerifierConfig()
    for task in ("choice", "tool", "arithmetic"):
        verifier_class(task, config)(config).close()
    assert set(TASKS) == {"math", "choice", "tool", "code", "arithmetic"}
