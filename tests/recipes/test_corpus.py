from itertools import islice

from mopd_nemo.chat import Chat
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.data.arithmetic import make_problems, split_of
from mopd_nemo.verifiers.answers import ArithmeticVerifier
from recipes.embedded_model.corpus import BUGS, Example, attempt, examples, to_ids

VERIFIER = ArithmeticVerifier(VerifierConfig())


def some(chat: Chat, count: int) -> list[Example]:
    return list(islice(examples(chat, seed=1), count))


def test_preparation_never_saw_a_problem_of_the_quickstart(chat: Chat) -> None:
    used = {p.id.removeprefix("arithmetic/") for split in ("train", "eval") for p in make_problems(split, 600)}
    for example in some(chat, 3000):
        assert split_of(example.expression) == "prepare"
        assert not any(expression in used for expression in example.user.split())


def test_attempts_are_what_they_say() -> None:
    import random

    rng = random.Random(0)
    for _ in range(200):
        assert attempt("7+5-3*4", None, rng).right
        for bug in BUGS:
            tried = attempt("7+5-3*4", bug, rng)
            assert (VERIFIER.judge(tried.text, "6", True).reward == 1.0) == tried.right
    assert not attempt("7+5-3*4", "marker", rng).right


def test_examples_mix_plain_questions_with_peers(chat: Chat) -> None:
    users = [example.user for example in some(chat, 1000)]
    shares = [
        sum("correct solution" in u and "failed attempt" not in u for u in users),
        sum("correct solution" in u and "failed attempt" in u for u in users),
        sum("correct solution" not in u and "failed attempt" in u for u in users),
        sum("Feedback" in u for u in users),
    ]
    assert all(share > 30 for share in shares)


def test_plain_questions_are_answered_rightly_some_of_the_time(chat: Chat) -> None:
    plain = [e for e in some(chat, 3000) if "Now solve" not in e.user]
    from mopd_nemo.data.arithmetic import evaluate

    right = sum(VERIFIER.judge(e.response, evaluate(e.expression), True).reward for e in plain) / len(plain)
    assert 0.35 < right < 0.55


def test_learned_part_starts_after_the_question(chat: Chat) -> None:
    for example in some(chat, 50):
        ids, start = to_ids(example, chat)
        assert chat.decode(ids[:start]).endswith("\\boxed{digit}.")
        assert chat.decode(ids[start:]).endswith(example.response)
