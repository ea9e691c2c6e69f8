"""What the teacher reads: peers and other sources, in what form, under which headings."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mopd_nemo.config.base import ConfigBlock

SOURCES = ("peers", "feedback", "privileged")
"""What `context` may name, beside a function of the user's as `module:function`."""


class Templates(ConfigBlock):
    """The text around peers and other evidence in the teacher's prompt. `{text}` stands for the evidence."""

    success: str = "\n\nA correct solution of this problem:\n\n{text}"
    """First success peer."""
    another_success: str = "\n\nAnother correct solution:\n\n{text}"
    """Every further success peer."""
    failure: str = "\n\nA failed attempt, its result is wrong; avoid its mistake:\n\n{text}"
    """Every failure peer; its text is the whole attempt."""
    failure_feedback: str = "\n\nWhat is wrong with this attempt:\n\n{text}"
    """After a failure peer with `failure_form: described`: the verifier's feedback on it."""
    failure_difference: str = "\n\nThis part of a failed attempt is wrong; do not write it:\n\n{text}"
    """Every failure peer with `failure_form: contrast`."""
    success_summary: str = "\n\nSummary of another correct solution: {text}"
    """Every success peer shown by its summary."""
    failure_summary: str = "\n\nSummary of a failed attempt: {text}"
    """Every failure peer shown by its summary."""
    feedback: str = "\n\nFeedback on an earlier failed attempt:\n\n{text}"
    """The verifier's feedback on the target itself, and on every failure peer with `failure_form: feedback`."""
    privileged: str = "\n\nThis is known about the problem:\n\n{text}"
    """The problem's text in the column `data.privileged_column`."""
    closing: str = "\n\nNow solve the problem above correctly."
    """End of the user turn, in every context that shows something."""
    cut: str = "\n[...]\n"
    """Replaces the middle of a text that exceeds its token budget."""

    @model_validator(mode="after")
    def _check_placeholders(self) -> Self:
        for name in set(Templates.model_fields) - {"closing", "cut"}:
            if getattr(self, name).count("{text}") != 1:
                raise ValueError(
                    f"peers.templates.{name}={getattr(self, name)!r}: write {{text}} exactly once, where the text goes"
                )
        return self


class RequireConfig(ConfigBlock):
    """What must exist in a group beside the target, whatever is shown; else there is no loss on it.

    Runs that show different peers then learn from the same targets.
    """

    successes: NonNegativeInt = 0
    """Least number of success peers, counted as `peers.dedupe` counts them."""
    failures: NonNegativeInt = 0
    """Least number of failure peers, counted likewise."""


class FeedbackConfig(ConfigBlock):
    """The verifier's feedback on the target itself, where `context` names `feedback`."""

    when: Literal["no_success", "always"] = "no_success"
    """`no_success`: only where the teacher reads no successful peer. `always`: whatever else it reads."""
    which: Literal["informative", "all"] = "informative"
    """`informative`: feedback that says more than that the target failed, such as a failed test's input. `all`:
    whatever it says."""


class LeakConfig(ConfigBlock):
    """Responses that speak of what only the teacher reads (docs/contexts.md). `leak/rate` counts them in every run."""

    action: Literal["report", "no_peer", "mask"] = "report"
    """`report`: count them. `no_peer`: such a response is shown to no teacher. `mask`: tokens that leak have loss 0;
    they stay in the mean."""
    words: Annotated[int, Field(ge=5)] = 12
    """Consecutive words of the privileged text that a response must repeat to leak."""


class PeersConfig(ConfigBlock):
    """Peers in the teacher's prompt for a target rollout (paper eq. 4, 6, 7). Default: two successes.

    Read where `context` names `peers`; budgets and templates hold for every source.
    """

    successes: NonNegativeInt | Literal["all"] = 2
    """Success peers per context."""
    failures: NonNegativeInt | Literal["all"] = 0
    """Failure peers per context. The paper shows one. A small model copies it (docs/results/real-model.md): ask
    `mopd preflight` first."""
    choose: Literal["fixed", "measured"] = "fixed"
    """How `successes`, `failures` and `failure_form` are chosen. `fixed`: as they stand. `measured`: before the first
    step the student answers after each context of `choose_from`, and the run shows the one that `mopd preflight` would
    recommend (docs/preflight.md)."""
    choose_every: NonNegativeInt = 50
    """Steps after which the choice is measured anew. 0: never."""
    choose_from: tuple[str, ...] = ("1s", "2s", "1s+1f", "2s+1f")
    """Contexts to choose from, named as for `mopd preflight`."""
    choose_problems: Annotated[int, Field(ge=8)] = 32
    """Problems that a choice is measured on. Up to six times as many are sampled to find them."""
    summaries: NonNegativeInt | Literal["all"] = 0
    """Further peers of either outcome, each shown by the text inside its `<summary>` tags, or by its first
    `max_summary_tokens` tokens if it has none. Ask for summaries with `data.train_prompt_suffix`."""
    order: Literal["canonical", "random", "shortest", "diverse"] = "canonical"
    """Ranking of peers. `canonical`: in sampling order, once per group. Most targets then share one context; targets
    that serve as peers get the next ones instead. `shortest`: fewest tokens first, once per group. `diverse`: most
    different from each other first, once per group. `random`: a seeded draw for each target."""
    dedupe: Literal["all", "peers", "none"] = "all"
    """Peers with equal text. `all`: they count once, and none that reads like the target is shown to it. `peers`: they
    count once, and a target may read its own text where another rollout wrote it too. `none`: each counts."""
    require: RequireConfig = RequireConfig()
    when_no_success: Literal["skip", "failure_only", "plain"] = "skip"
    """Peers of a target without a success peer. `skip`: none; it is not learned from, and costs no pass, unless another
    source of the context has something for it. `failure_only`: failures alone, and summaries where they are asked for;
    none if successes exist that read like it. `plain`: none; if no other source has something either, the teacher reads
    the prompt alone, which gives zero loss with `teacher.kind: live`."""
    failure_form: Literal["text", "described", "feedback", "contrast"] = "text"
    """What is shown of a failure peer. `text`: the attempt. `described`: the attempt, then the verifier's feedback on
    it. `feedback`: that feedback alone; failures without any are passed over. `contrast`: what of it no success in the
    context has, by statements of a program or steps of a text; nothing if that is nothing, the attempt if there is no
    success. `verifier.feedback` says what feedback reveals."""
    control: Literal["none", "random_peer", "unrelated_prompt", "success_only"] = "none"
    """Controls for ablations: replace the peers by as many others of similar length under the same headings.
    `random_peer`: from the group, whatever their outcome. `unrelated_prompt`: from other problems of the step, with
    the same outcome. `success_only`: successes in place of failures, from other problems if the group has no more."""
    strip_thinking_successes: bool = True
    """Remove thinking blocks from success peers."""
    strip_thinking_failures: bool = True
    """Remove thinking blocks from failure peers."""
    max_peer_tokens: PositiveInt = 2048
    """Longest peer, and longest text of any other source. A longer one loses its middle."""
    max_summary_tokens: PositiveInt = 64
    """Longest summary. A longer one is truncated."""
    max_context_tokens: PositiveInt = 10240
    """Longest teacher prompt. All that it shows shrinks to fit; question, closing and assistant header are never
    truncated."""
    templates: Templates = Templates()
    """The text around all that a teacher reads."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.successes == 0 and self.failures == 0:
            raise ValueError("peers.successes=0 and peers.failures=0 show the teacher no peers: raise one of them")
        failures_alone = self.when_no_success == "failure_only" and self.summaries == 0
        needs = {"failure_form": self.failure_form != "text", "when_no_success": failures_alone,
                 "control": self.control == "success_only"}  # fmt: skip
        for name in [name for name, reads_failures in needs.items() if reads_failures and self.failures == 0]:
            raise ValueError(
                f"peers.{name}={getattr(self, name)} is about failures, and peers.failures=0 shows none: "
                "set peers.failures=1, or leave it out"
            )
        if self.failure_form == "contrast" and self.successes == 0:
            raise ValueError(
                "peers.failure_form=contrast compares failures with the successes shown, and peers.successes=0 shows "
                "none: raise the latter or choose another form"
            )
        if self.failure_form != "text" and self.control != "none":
            raise ValueError(
                f"peers.failure_form={self.failure_form} with peers.control={self.control}: a control matches whole "
                "attempts; set peers.failure_form=text or peers.control=none"
            )
        return self
