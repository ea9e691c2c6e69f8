"""What the teacher says token by token: the numbers, the page and the terminal."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mopd_nemo.analysis.tokens import (
    Column,
    TokenView,
    legend,
    level,
    names_of,
    objections,
    score_contexts,
    write_token_page,
)
from mopd_nemo.chat import Chat
from mopd_nemo.commands.token_view import show_tokens
from mopd_nemo.config.load import load_config
from mopd_nemo.engines import make_engine
from mopd_nemo.engines.base import TokenSignal
from mopd_nemo.losses.reference import token_divergence
from mopd_nemo.peers.render import build_contexts
from mopd_nemo.terminal import Terminal
from tests.browser import Browser
from tests.conftest import QUICKSTART, make_group

HOSTILE = "</script><b>\x1b[31m[/bold]\u202e"


def signal_of(student: list[float], teacher: list[float], top: int = 1) -> TokenSignal:
    """A signal whose likeliest tokens are number 7."""
    p, q = np.array(student, np.float32), np.array(teacher, np.float32)
    ids, logprobs = np.full((len(p), top), 7), np.full((len(p), top), np.log(0.25))
    return TokenSignal(p, q, np.abs(q - p), ids, logprobs, ids, logprobs)


def view_of(texts: list[str], *signals: TokenSignal) -> TokenView:
    row = {"rollout": 3, "outcome": "wrong", "finished": True}
    return TokenView(row, tuple(texts), tuple(Column(f"context {i}", s) for i, s in enumerate(signals)))


def test_signal_is_that_of_the_models_logits(chat: Chat) -> None:
    config = load_config(QUICKSTART, ["teacher.kind=live", "divergence.support=full", "divergence.targets=failures"])
    engine = make_engine(config)
    group = make_group(chat, [("2+2=4 so \\boxed{4}", 1.0), ("it is \\boxed{5}", 0.0), ("\\boxed{6}", 0.0)])
    contexts = {
        name: build_contexts([group], chat, config.peers.model_copy(update={"successes": s, "failures": f}), "seed")
        for name, s, f in (("1s", 1, 0), ("1f", 0, 1))
    }
    found = score_contexts([group], contexts, engine, config, top=3)
    assert found["1s"][0][0] is None, "a lone success has no success to read"
    for name in contexts:
        for i, signal in enumerate(found[name][0]):
            prompt = contexts[name][0][i].prompt_ids
            if signal is None or prompt is None:
                continue
            response = group.rollouts[i].response_ids
            student, teacher = (_logits(engine, own, response) for own in (group.problem.prompt_ids, prompt))
            picked = torch.tensor(response)[:, None]
            for values, logits in ((signal.student, student), (signal.teacher, teacher)):
                wanted = logits.log_softmax(-1).gather(-1, picked).squeeze(-1)
                assert np.allclose(values, wanted, atol=1e-4)
            best = teacher.log_softmax(-1).topk(3)
            assert (signal.teacher_top_ids[:, 0] == best.indices[:, 0].numpy()).all()
            assert np.allclose(signal.teacher_top, best.values, atol=1e-4)
            kind = config.divergence.kind
            wanted = token_divergence(student, teacher, kind=kind, alpha=config.divergence.alpha, support="full")
            assert np.allclose(signal.divergence, wanted, atol=1e-4)


@torch.no_grad()
def _logits(engine, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *response]])
    return engine.student.module(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()


def test_token_texts_join_to_the_whole_and_keep_characters_of_several_tokens(chat: Chat) -> None:
    text = "2+2=4, é — 🎉\n\tend"
    ids = chat.encode(text)
    texts = chat.token_texts(ids)
    assert len(texts) == len(ids) and "".join(texts) == chat.decode(ids, skip_special_tokens=False)


def test_colours_have_steps_that_the_legend_names() -> None:
    assert [level(x) for x in (-9, -1.6, -0.6, -0.2, 0.05, 0.2, 0.6, 1.6, 9, float("nan"))] == [
        *(-4, -3, -2, -1, 0, 1, 2, 3, 4, 0)
    ]
    assert [step for step, _ in legend()] == list(range(-4, 5))
    assert objections(signal_of([-1, -1, -1], [-3, -0.5, -2]), 5) == [0, 2]
    assert objections(signal_of([-1, -1, -1], [-1.001, -1.0, -1.2]), 5) == [2], "a rounding error is no objection"


def test_page_escapes_text_and_holds_every_number(tmp_path: Path) -> None:
    view = view_of(["ok", HOSTILE], signal_of([-0.1, -0.2], [-0.1, -5.2]))
    about = {"problem": HOSTILE}
    page = write_token_page(tmp_path / "page.html", [view], {7: HOSTILE}, about, HOSTILE).read_text()
    assert page.count("</script>") == 2 and "<b>" not in page and "\x1b" not in page and "\u202e" not in page
    data = json.loads(re.search(r'id="token-data">(.*?)</script>', page, flags=re.DOTALL)[1])  # type: ignore[index]
    assert data["columns"][0]["q"] == [-0.1, -5.2] and data["columns"][0]["teacher"][1] == [[7, 0.25]]
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "nothing may be fetched from elsewhere"


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("colours", ["256", None])
def test_terminal_shows_tokens_within_its_width(width: int, colours: str | None) -> None:
    texts = ["word "] * 60 + [HOSTILE, "\n", "end"]
    view = view_of(texts, signal_of([-0.1] * 63, [-0.1] * 60 + [-6.0, 0.0, -0.1]))
    out = io.StringIO()
    colour: dict[str, Any] = {"color_system": colours, "force_terminal": colours is not None}
    console = Terminal(file=out, width=width, **colour)
    show_tokens([view], {7: HOSTILE}, console)
    text = out.getvalue()
    assert ("\x1b[" in text) == (colours is not None) and "\x1b[31m" not in text and "\u202e" not in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= width
    assert "[/bold]" in plain and "█" in plain and "25 %" in plain


@pytest.mark.parametrize("width", [1280, 390])
def test_hovering_a_token_shows_its_numbers(browser: Browser, tmp_path: Path, chat: Chat, width: int) -> None:
    signals = signal_of([-0.1] * 3, [-0.1, -5.25, -0.1], top=2), signal_of([-0.1] * 3, [-0.1, -0.2, -0.1])
    view = view_of(["a ", HOSTILE, " b"], *signals)
    names = names_of([view], chat) | {7: "seven"}
    file = write_token_page(tmp_path / "page.html", [view], names, {"problem": "p"}, "prompt")
    browser.open(file, width)
    assert browser.evaluate("document.getElementById('token').hidden") is True
    browser.hover(".tokens i:nth-child(2)")
    text = browser.evaluate("document.getElementById('token').innerText")
    assert "token 2 of 3" in text and "−5.250" in text and "−5.150" in text and "−0.200" in text
    assert "seven 25.0 %" in text and "␛[31m" in text
    assert browser.evaluate("document.querySelectorAll('.tokens i.on').length") == 2, "the same token in both contexts"
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
