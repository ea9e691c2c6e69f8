from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.groups import candidates
from tests.conftest import make_group


def test_verifier_error_is_neither_success_nor_failure(chat: Chat) -> None:
    pool = candidates(make_group(chat, [("a", 1.0), ("b", None), ("c", 0.0)]), chat, PeersConfig())
    assert (pool.successes, pool.failures) == ((0,), (2,))


def test_thinking_is_stripped_by_two_flags(chat: Chat) -> None:
    group = make_group(chat, [("<think>s</think>a", 1.0), ("<think>f</think>b", 0.0)])
    assert candidates(group, chat, PeersConfig()).texts == ("a", "b")
    keep_failures = PeersConfig(strip_thinking_failures=False)
    assert candidates(group, chat, keep_failures).texts == ("a", "<think>f</think>b")
    keep_successes = PeersConfig(strip_thinking_successes=False)
    assert candidates(group, chat, keep_successes).texts == ("<think>s</think>a", "b")
