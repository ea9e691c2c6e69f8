"""The teacher of NeMo-RL's loop without NeMo-RL: groups, masks and positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mopd_nemo.chat import Chat
from mopd_nemo.config import UserError
from mopd_nemo.engines.nemo.distillation.data import CUT_PROMPT, ProblemBook, Verdicts
from mopd_nemo.engines.nemo.distillation.teacher import PeerTeacher, laid_out, response_spans
from mopd_nemo.losses.logits import TopK
from mopd_nemo.losses.objectives import Divergence, PolicyGradient
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import Outcome, TrainExample, Verdict

QUESTIONS = ["1+1", "2*3"]
RESPONSES = [r"\boxed{2}", r"\boxed{3}", r"\boxed{6}", r"\boxed{7}"]
"""Two of each question; the first of each is right."""
K = 3


class Known(Verdicts):
    """Verdicts without environments: what holds the right digit is right."""

    def collect(self) -> None:
        self.collected = True

    def of(self, prompt: str, response: str) -> Verdict:
        right = ("1+1" in prompt) == ("2" in response) and ("2*3" in prompt) == ("6" in response)
        return Verdict(float(right), Outcome.CORRECT if right else Outcome.WRONG, success=right)


class Echo:
    """Scores by telling which response token is asked about: ids (token, token + 1, token + 2)."""

    def teach(self, rows: list[TrainExample], objective: Divergence) -> tuple[list[TopK], dict[str, float]]:
        ids = [torch.tensor(row.response_ids)[:, None] + torch.arange(K) for row in rows]
        return [TopK(part.int(), -part.float()) for part in ids], {}


def problem_book(chat: Chat) -> tuple[ProblemBook, list[list[int]]]:
    book = ProblemBook(chat)
    spec = SimpleNamespace(prompt=None, system_prompt=None)
    rows = [
        book.process(
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "2"}], "task_name": "sums"},
            spec,
            None,
            500,
            number,
        )
        for number, q in enumerate(QUESTIONS)
    ]
    return book, [row["message_log"][0]["token_ids"].tolist() for row in rows]


def loop_batch(chat: Chat, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """As `distillation_train` makes it: prompt, response, and what the environment said, padded."""
    said = list(chat.encode("Environment: wrong"))
    end = min(chat.end_ids)
    ids, masks = [], []
    for number, response in enumerate(RESPONSES):
        answer = [*chat.encode(response), end]
        prompt = prompts[number // 2]
        ids.append(torch.tensor([*prompt, *answer, *said]))
        masks.append(torch.tensor([0] * len(prompt) + [1] * len(answer) + [0] * len(said)))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=chat.pad_id),
        "input_lengths": torch.tensor([len(part) for part in ids]),
        "token_mask": pad(masks, batch_first=True),
        "sample_mask": torch.ones(len(ids)),
    }


def make_teacher(chat: Chat, build: Any, log: Any = lambda *_: None) -> tuple[PeerTeacher, dict[str, torch.Tensor]]:
    book, prompts = problem_book(chat)
    teacher = PeerTeacher(Echo(), build, book, Known(), chat, group_size=2, end_ids=chat.end_ids, steps_done=4, log=log)
    return teacher, loop_batch(chat, prompts)


def failures_learn(groups: Any, step: int) -> TrainBatch:
    """A method that teaches the failures alone."""
    examples = [
        TrainExample(g, r, group.problem.prompt_ids, group.rollouts[r].response_ids, (), (1, 2, 3))
        for g, group in enumerate(groups)
        for r in group.failures
    ]
    return TrainBatch(examples, [LossTerm(Divergence(k=K), tuple(range(len(examples))))], {"signal": float(step)})


def test_targets_lie_one_before_the_tokens_that_they_are_about(chat: Chat) -> None:
    written: list[Any] = []
    teacher, data = make_teacher(chat, failures_learn, lambda metrics, step: written.append((step, metrics)))
    found = teacher.get_topk_logits(data, k=K)
    shape = (*data["input_ids"].shape, K)
    assert found["topk_indices"].shape == found["topk_logits"].shape == shape
    assert data["sample_mask"].tolist() == [0.0, 1.0, 0.0, 1.0]  # of those that were taught
    for row in (1, 3):
        for position in data["token_mask"][row].nonzero().squeeze(-1).tolist():
            token = int(data["input_ids"][row, position])
            assert found["topk_indices"][row, position - 1].tolist() == [token, token + 1, token + 2]
            assert found["topk_logits"][row, position - 1].tolist() == [-token, -token - 1, -token - 2]
        assert (found["topk_logits"][row] != -100.0).any(-1).sum() == data["token_mask"][row].sum()
    assert (found["topk_logits"][[0, 2]] == -100.0).all() and found["topk_indices"][0, 0].tolist() == [0, 1, 2]
    ((step, metrics),) = written
    assert step == 5 and metrics["signal"] == 5.0 and metrics["success_rate"] == 0.5


def test_rollouts_are_put_into_their_groups_with_problem_text_and_verdict(chat: Chat) -> None:
    seen: list[Any] = []

    def build(groups: Any, step: int) -> TrainBatch:
        seen.extend(groups)
        return TrainBatch([], [])

    teacher, data = make_teacher(chat, build)
    found = teacher.get_topk_logits(data, k=K)
    assert not data["sample_mask"].any() and found["topk_indices"].shape[-1] == K
    assert [group.problem.messages[-1]["content"] for group in seen] == QUESTIONS
    assert [r.text for group in seen for r in group.rollouts] == RESPONSES
    assert all(r.finished for group in seen for r in group.rollouts)
    assert [group.successes for group in seen] == [(0,), (0,)]


def test_a_prompt_that_was_cut_teaches_nothing(chat: Chat) -> None:
    teacher, data = make_teacher(chat, failures_learn)
    data["sample_mask"][:2] = 0.0
    teacher.get_topk_logits(data, k=K)
    assert data["sample_mask"].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_rows_that_are_no_group_or_have_several_turns_are_refused(chat: Chat) -> None:
    teacher, data = make_teacher(chat, failures_learn)
    swapped = {name: part[[0, 2, 1, 3]] for name, part in data.items()}
    with pytest.raises(UserError, match=r"rows 0 to 1 of a batch have 2 prompts: .*num_generations_per_prompt"):
        teacher.get_topk_logits(swapped, k=K)
    data["token_mask"][2, int(data["input_lengths"][2]) - 1] = 1
    with pytest.raises(UserError, match=r"row 2 of a batch has several turns .*max_rollout_turns=1"):
        response_spans(data)


def test_a_method_with_another_objective_is_refused(chat: Chat) -> None:
    def build(groups: Any, step: int) -> TrainBatch:
        batch = failures_learn(groups, step)
        return TrainBatch(batch.examples, [*batch.terms, LossTerm(PolicyGradient(), (0,))])

    teacher, data = make_teacher(chat, build)
    with pytest.raises(UserError, match=r"^peer_teacher.method: NeMo-RL's loop minimises one divergence"):
        teacher.get_topk_logits(data, k=K)


def test_targets_of_no_row_are_harmless() -> None:
    found = laid_out([], [], (2, 5), 4)
    assert found["topk_indices"].unique().tolist() == [0, 1, 2, 3] and (found["topk_logits"] == -100.0).all()


def test_the_processor_keeps_nemo_rl_s_contract(chat: Chat) -> None:
    book = ProblemBook(chat)
    row = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}], "task_name": "sums"}
    spec = SimpleNamespace(prompt="Answer this: {}", system_prompt=None)
    datum = book.process(row, spec, None, 500, 3)
    (message,) = datum["message_log"]
    ids = tuple(message["token_ids"].tolist())
    assert message["role"] == "user" and message["content"] == chat.decode(ids, skip_special_tokens=False)
    assert "Answer this: 1+1" in message["content"]
    assert (datum["length"], datum["loss_multiplier"], datum["idx"], datum["task_name"]) == (len(ids), 1.0, 3, "sums")
    assert datum["extra_env_info"] == {"answer": "2"}
    problem = book.problem(ids)
    assert (problem.id, problem.answer, problem.task) == ("sums/3", "2", "sums")
    assert book.prompt_text(problem) == message["content"]
    long = book.process(row, spec, None, len(ids), 4)
    assert long["loss_multiplier"] == 0.0 and len(long["message_log"][0]["token_ids"]) == CUT_PROMPT
    with pytest.raises(UserError, match=r"made by another data processor: set processor: mopd_data_processor"):
        book.problem((1, 2, 3))
    with pytest.raises(UserError, match=r"row 0 of sums: mopd_data_processor needs messages that end with"):
        book.process({"messages": row["messages"][:1], "task_name": "sums"}, spec, None, 500, 0)


def test_verdicts_are_those_of_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda answer: answer))

    class Environment:
        """As an actor handle: NeMo-RL's own, and one of ours, which adds its verdict."""

        def __init__(self, verdict: Verdict | None) -> None:
            self.step = SimpleNamespace(remote=self.answer)
            self.name = "environment"
            self._verdict = verdict

        def answer(self, logs: list[Any], infos: list[Any]) -> Any:
            back = infos if self._verdict is None else [{**info, "verdict": self._verdict} for info in infos]
            return SimpleNamespace(
                observations=[{"content": f"said of {log[-1]['content']}"} for log in logs],
                metadata=back,
                rewards=torch.tensor([float(log[-1]["content"] == "good") for log in logs]),
            )

    ours = Verdict(0.5, Outcome.TIMEOUT, feedback="late", success=True)
    verdicts = Verdicts()
    watched = verdicts.watch({"theirs": Environment(None), "ours": Environment(ours)})
    assert watched["ours"].name == "environment"
    for name, answers in (("theirs", ["good", "bad"]), ("ours", ["slow"])):
        logs = [[{"role": "user", "content": name}, {"role": "assistant", "content": text}] for text in answers]
        assert watched[name].step.remote(logs, [{}] * len(logs)).rewards is not None
    verdicts.collect()
    assert verdicts.of("theirs", "good") == Verdict(1.0, Outcome.CORRECT, success=True)
    assert verdicts.of("theirs", "bad") == Verdict(0.0, Outcome.WRONG, "said of bad", success=False)
    assert verdicts.of("ours", "slow") is ours
    with pytest.raises(UserError, match="no environment has judged the response 'good'"):
        verdicts.of("ours", "good")
    verdicts.collect()
    with pytest.raises(UserError, match="no environment has judged"):
        verdicts.of("theirs", "good")
