"""An answer inside a thinking block is no answer, in every task."""

from typing import Any

import pytest

from mopd_nemo.config.verifiers import ChoiceConfig, CodeConfig, VerifierConfig
from mopd_nemo.types import Message, Outcome, Problem, Rollout
from mopd_nemo.verifiers.pool import PendingVerdicts, VerifierPool
from mopd_nemo.verifiers.sandbox.layers import LayerName

ANSWERS: dict[str, tuple[str, Any]] = {
    "math": (r"\boxed{42}", "42"),
    "arithmetic": (r"\boxed{42}", "42"),
    "choice": ("<answer>C</answer>", "C"),
    "tool": ("Action: f\nAction Input: {}\n", '[{"Action": "f", "Action_Input": "{}"}]'),
    "code": ("```python\nprint(1)\n```\n", {"inputs": [""], "outputs": ["1"]}),
}
RESPONSES = {
    # form, whether there is an answer where the prompt opens no block, and where it does
    "{answer}": (True, False),
    "<think>maybe</think>{answer}": (True, True),
    "<think>maybe {answer} But wait": (False, False),
    "<think>maybe {answer}</think> I do not know": (False, False),
    "maybe</think>{answer}": (True, True),
    "<think>a</think> so <think>or {answer}": (False, False),
    "maybe {answer} But": (True, False),
    "{answer}</think>": (False, False),
    "<think>one</think>{answer}<think>unless": (True, True),
}


class Template:
    """A chat of which only the end of the prompt matters."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return self._prompt


@pytest.fixture(scope="module")
def pool(best_layer: LayerName):
    config = VerifierConfig(workers=1, choice=ChoiceConfig(format="lenient"), code=CodeConfig(sandbox=best_layer))
    with VerifierPool(config, list(ANSWERS)) as pool:
        yield pool


@pytest.mark.parametrize("task", ANSWERS)
@pytest.mark.parametrize("finished", [True, False])
def test_only_what_stands_outside_of_thinking_is_judged(pool: VerifierPool, task: str, finished: bool) -> None:
    text, gold = ANSWERS[task]
    problem = Problem("p", (Message(role="user", content="?"),), gold, task, (1,))
    rollouts = [Rollout((1,), form.format(answer=f"\n{text}"), finished, (0.0,)) for form in RESPONSES]
    for column, prompt in enumerate(("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")):
        chat: Any = Template(prompt)
        (verdicts,) = PendingVerdicts(pool, chat).collect([problem], [rollouts])
        for (form, answered), verdict in zip(RESPONSES.items(), verdicts, strict=True):
            missing = Outcome.BAD_FORMAT if finished else Outcome.TRUNCATED
            assert verdict.outcome is (Outcome.CORRECT if answered[column] else missing), (form, prompt)
