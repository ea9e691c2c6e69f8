"""Settings of the verifiers: the `verifier` block of the config."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from mopd_nemo.config.base import ConfigBlock


class MathConfig(ConfigBlock):
    """Task `math`: the last boxed or stated final answer, compared symbolically."""

    seconds_per_answer: PositiveFloat = 5.0
    """An answer that is not decided by then is wrong: its worker is killed and replaced."""


class ChoiceConfig(ConfigBlock):
    """Task `choice`: one letter."""

    format: Literal["strict", "lenient"] = "strict"
    """`strict`: exactly one capital letter inside the last `<answer>` tags; `lenient`: also `(b)`, `B. text`,
    `\\boxed{B}`, `The answer is B` or the letter alone."""


class CodeConfig(ConfigBlock):
    """Task `code`: programs run on hidden tests, in a sandbox."""

    mode: Literal["official", "paper"] = "official"
    """`official`: LiveCodeBench's rules and all of Python; `paper`: the stricter rules of the paper's code, for
    comparison with its numbers."""
    all_tests: bool = False
    """Run the tests after a failed one too, so that `details.passed` is exact. The verdict stays the same. A program
    that is too slow then takes `seconds_per_test` for each test. `mode: paper` always does it."""
    seconds_per_test: PositiveFloat = 6.0
    """Wall-clock limit of one test. LiveCodeBench's is 6."""
    memory_mb: PositiveInt = 1024
    """Limit of one test, in MiB, all its processes together."""
    output_mb: PositiveInt = 16
    """Limit of what one test prints, and of any file it writes, in MiB."""
    scratch_mb: PositiveInt = 64
    """Size of a program's scratch directory, in MiB of memory."""
    processes: PositiveInt = 32
    """Limit of processes and threads of one test."""
    sandbox: Literal["auto", "bubblewrap", "namespaces", "rlimits"] = "auto"
    """Isolation of programs from the machine. `auto`: bubblewrap, else namespaces, else an error. `rlimits` protects
    neither files nor network and is never chosen by `auto`."""


class CustomConfig(ConfigBlock):
    """A judge of your own, by import path. Written as text it is `judge` alone."""

    judge: str
    """`module:Name` of a `Verifier`, or of a function `(response, answer, finished)` that returns a `Verdict`, a reward
    or true or false. The module is on the Python path or in the working directory."""
    seconds: PositiveFloat = 60.0
    """A response that is not judged by then is a verifier error: its worker is killed and replaced."""
    memory_mb: PositiveInt = 8192
    """Limit of the worker's address space while it judges, in MiB. Python itself takes about 50; imports of
    the judge count."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"judge": given} if isinstance(given, str) else given

    @field_validator("judge")
    @classmethod
    def _check_path(cls, judge: str) -> str:
        if not re.fullmatch(r"[\w.]+:\w+", judge):
            raise ValueError(f"verifier.custom: judge={judge!r}: write module:Name, such as my_judges:Poem")
        return judge


class HttpConfig(ConfigBlock):
    """A judge that is served: it answers HTTP requests (docs/verifiers.md)."""

    url: str
    """Where requests go, such as `http://judge:8000/verdict`, without user, password or query. No proxy is used."""
    seconds: PositiveFloat = 30.0
    """Limit of one request."""
    retries: NonNegativeInt = 3
    """Further tries after a request that had no answer, or status 408, 429 or 5xx. The wait doubles from half a second,
    up to 8 s, or is what the server asks for."""
    in_flight: PositiveInt = 16
    """Requests at the same time."""
    token_env: str | None = None
    """Environment variable whose value is sent as `Authorization: Bearer`. The value is in no file of the run."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if not re.fullmatch(r"https?://(?:[\w.-]+|\[[\da-fA-F:]+\])(?::\d{1,5})?(?:/[^\s?#@]*)?", url):
            raise ValueError("verifier.http: write a url as http://host:port/path; secrets belong into token_env")
        return url


class FeedbackConfig(ConfigBlock):
    """Feedback on failures. `context` and `peers.failure_form` say whether teachers read it."""

    reveal_gold: bool = False
    """Include the right answer, or the expected output of the failed test. It then reaches the teacher's prompt."""


class VerifierConfig(ConfigBlock):
    """The verifiers."""

    success_threshold: float = 0.5
    """τ of eq. 3: a rollout is a success when its reward is at least this."""
    workers: PositiveInt | None = None
    """Worker processes for the tasks `math` and `code`. `null`: one per core. The other tasks need none."""
    math: MathConfig = MathConfig()
    choice: ChoiceConfig = ChoiceConfig()
    code: CodeConfig = CodeConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    custom: dict[str, CustomConfig] = Field(default_factory=dict)
    """Tasks with a judge of your own, such as `{poem: my_judges:Poem}`, or `{poem: {judge: my_judges:Poem, seconds: 5,
    memory_mb: 8192}}`. Worker processes judge them."""
    http: dict[str, HttpConfig] = Field(default_factory=dict)
    """Tasks with a served judge: `{poem: {url: "http://judge:8000/verdict", seconds: 30, retries: 3, in_flight: 16,
    token_env: JUDGE_TOKEN}}`; all but `url` have defaults."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for task in sorted(self.custom.keys() & self.http.keys()):
            raise ValueError(f"verifier.custom.{task} and verifier.http.{task} judge the same task: remove one")
        return self
