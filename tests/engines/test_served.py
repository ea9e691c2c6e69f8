"""The client of a served teacher: replicas, retries, refusals, secrets. A scripted server misbehaves in every way."""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, TeacherError, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.engines import served
from mopd_nemo.engines.models import load_tokenizer
from mopd_nemo.engines.served import ServedTeacher
from mopd_nemo.engines.serving import Answer
from tests.conftest import QUICKSTART, make_random_model
from tests.engines.scripted_server import ScriptedServer

SEQUENCES = [((5, 6, 7), (8, 9)), ((9,), (8, 7, 6, 5)), ((11, 12), (13,))]
KEY = "sk-very-secret-4711"

pytestmark = pytest.mark.usefixtures("no_waits")


def config(*servers: ScriptedServer, settings: tuple[str, ...] = ()) -> Config:
    urls = ",".join(server.url for server in servers)
    given = ["teacher.kind=server", f"teacher.urls=[{urls}]", "divergence.support=teacher_topk", "divergence.k=5"]
    return load_config(QUICKSTART, [*given, *settings])


def teacher_of(teacher_model: Path, *servers: ScriptedServer, settings: tuple[str, ...] = ()) -> ServedTeacher:
    chat = Chat(load_tokenizer(str(teacher_model), key="model.path"))
    teacher = ServedTeacher(config(*servers, settings=settings), "", chat, len(chat.tokenizer))
    for server in servers:
        server.asked.clear()
    return teacher


def score(teacher: ServedTeacher, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
    with teacher.asking(sequences) as asking:
        return asking.wait(None)


def test_answers_are_those_of_the_model_in_order(teacher_model: Path, server: ScriptedServer) -> None:
    answers = score(teacher_of(teacher_model, server), SEQUENCES)
    for (prompt, response), answer in zip(SEQUENCES, answers, strict=True):
        with torch.no_grad():
            logits_TV = server._model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        top = logits_TV.log_softmax(-1).topk(5)
        assert answer.ids == top.indices.tolist()
        torch.testing.assert_close(torch.tensor(answer.logprobs), top.values)


def test_no_more_requests_are_in_flight_than_allowed(teacher_model: Path, server: ScriptedServer) -> None:
    server.slow = 0.01
    score(teacher_of(teacher_model, server, settings=("teacher.max_in_flight=2",)), SEQUENCES * 4)
    assert server.highest == 2 and len(server.asked) == 12


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_failed_request_is_sent_again(teacher_model: Path, server: ScriptedServer, status: int) -> None:
    teacher = teacher_of(teacher_model, server)
    expected = score(teacher, SEQUENCES)
    server.statuses = [status] * 4
    assert score(teacher, SEQUENCES) == expected and teacher.retries == 4


def test_waits_grow_and_follow_the_server(
    teacher_model: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "FIRST_WAIT", 1.0)
    waits: list[float] = []
    monkeypatch.setattr(served._Asking, "_wait", lambda _, seconds: waits.append(seconds))
    teacher = teacher_of(teacher_model, server, settings=("teacher.retries=3",))
    server.statuses = [500] * 4
    with pytest.raises(TeacherError, match=f"{server.url} answers 500 .the script says so."):
        score(teacher, SEQUENCES[:1])
    assert waits == [1.0, 2.0, 4.0]
    assert [served._seconds("7"), served._seconds(None), served._seconds("Wed, 21 Oct")] == [7.0, 0.0, 0.0]


def test_a_dead_replica_is_left_out_and_its_rows_go_to_the_other(
    teacher_model: Path, server: ScriptedServer, second: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = teacher_of(teacher_model, server, second, settings=("teacher.max_in_flight=2", "teacher.retries=1"))
    expected = score(teacher, SEQUENCES * 4)
    server.before = server.die
    assert score(teacher, SEQUENCES * 4) == expected
    assert teacher.num_replicas == 1 and caplog.text.count(f"teacher at {server.url}") == 1
    second.asked.clear()
    assert score(teacher, SEQUENCES) == expected[:3] and len(second.asked) == 3


def test_requests_are_dealt_over_replicas(teacher_model: Path, server: ScriptedServer, second: ScriptedServer) -> None:
    server.slow = second.slow = 0.01
    score(teacher_of(teacher_model, server, second, settings=("teacher.max_in_flight=1",)), SEQUENCES * 4)
    assert min(len(server.asked), len(second.asked)) >= 3 and len(server.asked) + len(second.asked) == 12


def test_without_a_replica_left_the_error_names_them_all(
    teacher_model: Path, server: ScriptedServer, second: ScriptedServer
) -> None:
    teacher = teacher_of(teacher_model, server, second, settings=("teacher.retries=1",))
    server.before, second.before = server.die, second.die
    with pytest.raises(TeacherError) as stopped:
        score(teacher, SEQUENCES * 4)
    assert server.url in str(stopped.value) and second.url in str(stopped.value)
    with pytest.raises(TeacherError, match=server.url):
        score(teacher, SEQUENCES)


def test_a_server_that_does_not_answer_in_time_is_left_out(teacher_model: Path, server: ScriptedServer) -> None:
    teacher = teacher_of(teacher_model, server, settings=("teacher.timeout=0.2", "teacher.retries=1"))
    forever = threading.Event()
    server.before = lambda: forever.wait(5)
    with pytest.raises(TeacherError, match=f"{server.url} timed out"):
        score(teacher, SEQUENCES[:1])
    forever.set()


def positions(answer: dict[str, Any]) -> list[Any]:
    return answer["choices"][0]["prompt_logprobs"]


def change(place: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """Another value at the likeliest token of a position."""

    def spoil(answer: dict[str, Any]) -> None:
        next(entry for entry in positions(answer)[place].values() if entry["rank"] == 1).update(changes)

    return spoil


def shift(answer: dict[str, Any]) -> None:
    positions(answer)[1:] = [*positions(answer)[2:], positions(answer)[1]]


def lose_the_likeliest(answer: dict[str, Any]) -> None:
    position = positions(answer)[3]
    del position[next(token for token, entry in position.items() if entry["rank"] == 2)]


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shifted by one": (shift, r"token 1 of the prompt has no log-probability of token 6"),
    "cut": (lambda a: positions(a).pop(), r"of 4 tokens, and 5 were sent: the server has cut the prompt .--max-model"),
    "longer": (lambda a: positions(a).append(positions(a)[-1]), r"of 6 tokens, and 5 were sent"),
    "empty position": (lambda a: positions(a).__setitem__(4, None), r"token 1 of the response has no log-probability"),
    "none": (lambda a: a["choices"][0].update(prompt_logprobs=None), r"it has no prompt_logprobs"),
    "no choice": (lambda a: a.update(choices=[]), r"it has no 0"),
    "null": (change(3, logprob=None), r"token 0 of the response: None is no log-probability"),
    "missing": (change(3, logprob="0"), r"'0' is no log-probability"),
    "NaN": (change(3, logprob=float("nan")), r"nan is no log-probability"),
    "logits": (change(3, logprob=7.5), r"7.5 is no log-probability"),
    "too likely": (change(3, logprob=0.0), r"probabilities add up to more than 1"),
    "out of order": (change(3, logprob=-30.0), r"the likeliest tokens are out of order"),
    "one of k is missing": (lose_the_likeliest, r"4 of the 5 likeliest tokens are there"),
    "no rank": (change(3, rank=None), r"has rank None"),
    "other tokens": (
        lambda a: a["choices"][0].update(prompt_token_ids=[5, 6, 7, 8, 10]),
        r"it scored other tokens than those sent: 10 in place of 9 at position 4",
    ),
    "not JSON": (lambda a: b"<html>", r"it is not JSON"),
    "half JSON": (lambda a: json.dumps(a).encode()[:-9], r"it is not JSON"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(
    teacher_model: Path, server: ScriptedServer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(teacher_model, server)
    spoil, message = SPOILT[kind]
    server.spoil = lambda answer: spoil(answer) if kind.endswith("JSON") else spoil(answer) and None
    with pytest.raises(TeacherError, match=rf"the answer of {server.url} cannot be used: .*{message}"):
        score(teacher, [((5, 6, 7), (8, 9))])
    assert len(server.asked) == 1, "it is not asked again"


def test_a_sampled_token_of_probability_0_is_an_error(teacher_model: Path, server: ScriptedServer) -> None:
    settings = ("divergence.support=sampled", "divergence.kind=reverse_kl", "divergence.k=100")
    teacher = teacher_of(teacher_model, server, settings=settings)
    server.spoil = lambda a: positions(a)[3]["8"].update(logprob=-9999.0)
    with pytest.raises(TeacherError, match="token 8 has probability 0"):
        score(teacher, [((5, 6, 7), (8, 9))])


def test_a_refused_request_is_not_sent_again(teacher_model: Path, server: ScriptedServer) -> None:
    teacher = teacher_of(teacher_model, server)
    server.statuses = [400]
    with pytest.raises(TeacherError, match=f"{server.url} answers 400 .the script says so."):
        score(teacher, SEQUENCES[:1])
    assert len(server.asked) == 1


# --- before anything starts ------------------------------------------------------------------------------------------


def refused(teacher_model: Path, *servers: ScriptedServer, settings: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as stopped:
        teacher_of(teacher_model, *servers, settings=settings)
    return str(stopped.value)


def test_a_server_that_is_not_there(teacher_model: Path, server: ScriptedServer) -> None:
    server.die()
    message = refused(teacher_model, server)
    assert server.url in message and "start the server" in message


def test_fewer_log_probabilities_than_k(teacher_model: Path) -> None:
    with ScriptedServer(teacher_model, max_logprobs=4) as server:
        message = refused(teacher_model, server)
    assert "max allowed: 4" in message and "start the server with --max-logprobs 5" in message


def test_k_of_more_than_the_vocabulary(teacher_model: Path, server: ScriptedServer) -> None:
    assert "divergence.k=5000 is more than the" in refused(teacher_model, server, settings=("divergence.k=5000",))


def test_a_server_that_reads_too_little(teacher_model: Path) -> None:
    with ScriptedServer(teacher_model, max_model_len=200) as server:
        assert f"exceeds the 200 tokens that {server.url} reads: start it with --max-model-len" in refused(
            teacher_model, server
        )


def test_a_model_that_is_not_served(teacher_model: Path, server: ScriptedServer) -> None:
    message = refused(teacher_model, server, settings=("teacher.model=other",))
    assert f"teacher.model='other': {server.url} serves tiny: name one" in message


def test_another_tokenizer(teacher_model: Path, tmp_path: Path) -> None:
    """The same tokens, with some merges gone."""
    other = shutil.copytree(teacher_model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-40]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with ScriptedServer(other) as server:
        assert f"the tokenizer of {server.url} differs from that of the student" in refused(teacher_model, server)


def test_another_id_of_a_special_token(teacher_model: Path, server: ScriptedServer) -> None:
    decode = server.chat.decode
    server.chat.decode = lambda ids, **k: decode([{0: 1, 1: 0}.get(i, i) for i in ids], **k)
    assert f"the tokenizer of {server.url} differs" in refused(teacher_model, server)


def test_a_larger_vocabulary(teacher_model: Path, server: ScriptedServer) -> None:
    server._model.resize_token_embeddings(server._model.config.vocab_size + 64)
    assert f"the model of {server.url} has more tokens than the" in refused(teacher_model, server)


def test_a_smaller_vocabulary(teacher_model: Path, server: ScriptedServer) -> None:
    server._model.resize_token_embeddings(server._model.config.vocab_size - 1)
    assert "is out of vocabulary" in refused(teacher_model, server)


def test_replicas_of_two_models(teacher_model: Path, server: ScriptedServer, tmp_path: Path) -> None:
    with ScriptedServer(make_random_model(tmp_path, seed=8)) as other:
        assert f"{server.url} and {other.url} serve different models" in refused(teacher_model, server, other)


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_never_shown(
    teacher_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with ScriptedServer(teacher_model, api_key=KEY) as server:
        monkeypatch.setenv("MOPD_TEACHER_API_KEY", f"{KEY}\n")
        teacher = teacher_of(teacher_model, server)
        assert len(score(teacher, SEQUENCES)) == 3
        server._api_key = "another"
        with pytest.raises(TeacherError) as stopped:  # the server repeats the key in its answer
            score(teacher, SEQUENCES)
        monkeypatch.setenv("MOPD_TEACHER_API_KEY", f"{KEY}x")
        message = refused(teacher_model, server)
    assert "401 (Unauthorized: Bearer (the key))" in str(stopped.value) and "(the key)" in message
    assert KEY not in f"{stopped.value}{message}{caplog.text}{config(server)!r}"


def test_the_variable_of_the_key_can_be_named(teacher_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(teacher_model, api_key=KEY) as server:
        settings = ("teacher.api_key_env=MY_KEY",)
        assert "teacher.api_key_env=MY_KEY: this environment variable is not set" in refused(
            teacher_model, server, settings=settings
        )
        message = refused(teacher_model, server, settings=(f"teacher.api_key_env={KEY}",))
        assert "teacher.api_key_env is no name" in message and KEY not in message
        monkeypatch.setenv("MY_KEY", KEY)
        teacher_of(teacher_model, server, settings=settings)
        monkeypatch.setenv("MY_KEY", f"{KEY}\n{KEY}")
        message = refused(teacher_model, server, settings=settings)
        assert "its value is no API key" in message and KEY not in message
