"""SGLang's protocol, on answers written by hand after its source. No server of it has been tried."""

from typing import Any

import pytest

from mopd_nemo.engines.serving import Answer, AnswerError, Question, Sglang

IDS = (4, 7, 2, 9)
QUESTION = Question(IDS, start=2, k=2, vocab_size=10)


def answer() -> dict[str, Any]:
    """Entries begin at the position before the response, whose own is missing; the last token's id is written as 0."""
    return {
        "meta_info": {
            "input_token_logprobs": [[None, 7, None], [-0.5, 2, None], [-3.0, 0, None]],
            "input_top_logprobs": [
                None,
                [[-0.5, 2, None], [-1.5, 3, None]],
                [[-0.25, 1, None], [-2.0, 5, None]],
            ],
        }
    }


def test_what_is_asked() -> None:
    path, body = Sglang().question("any", QUESTION)
    assert path == "generate" and body["input_ids"] == [4, 7, 2, 9]
    assert (body["logprob_start_len"], body["top_logprobs_num"], body["return_logprob"]) == (1, 2, True)


def test_an_answer_is_read_row_by_row() -> None:
    assert Sglang().answer(answer(), QUESTION) == Answer([[2, 3], [1, 5]], [[-0.5, -1.5], [-0.25, -2.0]], [-0.5, -3.0])


def test_without_k_the_sampled_tokens_are_read() -> None:
    sampled = Question(IDS, start=2, k=0, vocab_size=10)
    assert Sglang().answer(answer(), sampled) == Answer([[2], [9]], [[-0.5], [-3.0]], [-0.5, -3.0])


def damaged(kind: str) -> dict[str, Any]:
    body = answer()
    meta = body["meta_info"]
    own, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
    match kind:
        case "shifted":
            meta["input_token_logprobs"] = [[None, 4, None], [-1.0, 7, None], [-0.5, 2, None]]
        case "cut":
            own.pop()
        case "fewer":
            tops[2].pop()
        case "none":
            tops[2] = None
        case "null":
            own[2][0] = None
        case "out of order":
            tops[2].reverse()
        case "another":
            tops[2][0][1] = 10
        case "missing":
            del meta["input_top_logprobs"]
    return body


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shifted", "token 0 of the response has a log-probability of token 7, not of 2"),
        ("cut", "log-probabilities of 1 tokens, 2 were asked for: the server has cut the prompt"),
        ("fewer", "token 1 of the response: 1 of the 2 likeliest tokens are there"),
        ("none", "token 1 of the response: 0 of the 2 likeliest tokens are there"),
        ("null", "token 1 of the response: None is no log-probability"),
        ("out of order", "token 1 of the response: the likeliest tokens are out of order"),
        ("another", "token 10 is not one of the student's 10"),
        ("missing", "it has no input_top_logprobs"),
    ],
)
def test_what_is_not_what_was_asked_for_is_an_error(kind: str, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        Sglang().answer(damaged(kind), QUESTION)
