"""What is scored of recorded groups: complete contexts alone, and equal responses once."""

from __future__ import annotations

import numpy as np

from mopd_nemo.analysis.branches.scoring import PLAIN, _score_part
from mopd_nemo.analysis.tokens import score_contexts
from mopd_nemo.chat import Chat
from mopd_nemo.config.load import load_config
from mopd_nemo.engines import make_engine
from mopd_nemo.peers.render import build_contexts, plain_contexts
from tests.conftest import QUICKSTART, make_group


def test_equal_responses_are_scored_once_and_say_the_same(chat: Chat) -> None:
    config = load_config(QUICKSTART, ["teacher.kind=live"])
    engine = make_engine(config)
    right, wrong = ("it is \\boxed{2}", 1.0), ("\\boxed{6}", 0.0)
    group = make_group(chat, [right, wrong, right, wrong, ("so \\boxed{2}", 1.0)])
    peers = {
        name: config.peers.model_copy(update={"successes": n, "failures": 0}) for name, n in (("1s", 1), ("3s", 3))
    }
    contexts = {name: build_contexts([group], chat, own, "seed") for name, own in peers.items()}
    contexts[PLAIN] = plain_contexts([group])
    asked = []
    score = engine.score

    def counted(batch, *others):
        asked.append(len(batch.examples))
        return score(batch, *others)

    engine.score = counted
    found = _score_part([group], contexts, engine, config)
    assert asked == [6], "three texts, each after its own prompt and after that of one success"
    assert found["3s"][0] == [None] * 5, "two texts of successes are not three"
    for name in ("1s", PLAIN):
        for own, other in zip(
            found[name][0], score_contexts([group], contexts, engine, config, 1)[name][0], strict=True
        ):
            assert own is not None and other is not None
            assert np.allclose(own.student, other.student, atol=1e-5)
            assert np.allclose(own.teacher, other.teacher, atol=1e-5)
            assert np.allclose(own.divergence, other.divergence, atol=1e-5)
