"""Every setting and its default: one pydantic tree, unknown keys refused.

`mopd_nemo.config.load` reads YAML into it. Defaults are the paper's (section 5.1) where it states them.
`docs/configuration.md` is generated from the docstrings below.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mopd_nemo.config.base import ConfigBlock, Duration, Fraction, seconds_of
from mopd_nemo.config.nemo import NemoConfig
from mopd_nemo.config.slurm import ClusterConfig
from mopd_nemo.config.verifiers import VerifierConfig


class ModelConfig(ConfigBlock):
    """The student."""

    path: str = "embedded:arithmetic"
    """Hugging Face model directory or hub name; `embedded:arithmetic` is the tiny model that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision. Master weights and optimiser state are float32 in both."""
    device: str = "auto"
    """`auto` (CUDA when there is one, else CPU), `cpu`, `cuda` or `cuda:N`."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, for student and teacher alike; for Qwen3 `{enable_thinking: false}`."""
    end_tokens: tuple[str, ...] = ()
    """Tokens that end a response, beside the tokenizer's own. The token that ends a turn in the chat template must be
    one of all these: base models often need `["<|im_end|>"]`."""


class DataConfig(ConfigBlock):
    """Where problems come from."""

    train: str = "arithmetic"
    """`arithmetic` (built in) or a JSONL file with rows `{id, prompt or messages, answer, task}`."""
    eval: str = "arithmetic"
    """Held-out problems, same forms as `train`."""
    num_train: PositiveInt | None = None
    """Use only the first so many training problems. Default: all."""
    num_eval: PositiveInt | None = None
    """Use only the first so many held-out problems. Default: all."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """For a malformed row of a JSONL file: `stop` with an error that names file, line and field, or `skip` it, with a
    warning that does."""
    prompt_suffix: str = ""
    """Appended to the user turn of every problem, in training and in evaluation."""
    escape_control_tokens: bool = True
    """Break up control tokens of the tokenizer in the text of a row (`< |im_end|>`): what a row says opens and ends no
    turns. `false` for rows that hold templated text on purpose."""
    max_prompt_tokens: PositiveInt = 2048
    """A longer prompt is an error that names the problem: nothing is cut silently."""


class RolloutConfig(ConfigBlock):
    """Sampling during training."""

    num_prompts_per_step: PositiveInt = 32
    """Problems per step."""
    num_rollouts_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Group size G of eq. 2. At least 2: peers come from the same group."""
    max_response_tokens: PositiveInt = 4096
    """A response that reaches it is cut and marked unfinished."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. Student and teacher distributions in the loss are at temperature 1."""
    importance_clip: PositiveFloat | None = 2.0
    """Token losses are weighted by min(P(y) / the sampler's P(y), this), which makes up for a sampler that is not quite
    the trainer. Nothing: no weights."""
    batch_size: PositiveInt = 256
    """Sequences decoded at once by the local engine."""


class GenerationConfig(ConfigBlock):
    """What draws rollouts for `engine: local`; with `engine: nemo` it is vLLM, set up in `nemo.generation`."""

    backend: Literal["local", "vllm"] = "local"
    """`local`: the engine's own sampler; `vllm`: vLLM in the same process, its weights refreshed after every update."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Share of the GPU's memory for vLLM's weights and cache. On a CPU vLLM reads `VLLM_CPU_KVCACHE_SPACE` (GiB)."""


class Templates(ConfigBlock):
    """The text around peers in the teacher's prompt. `{text}` stands for the peer or the feedback."""

    success: str = "\n\nA correct solution of this problem:\n\n{text}"
    """First success peer."""
    another_success: str = "\n\nAnother correct solution:\n\n{text}"
    """Every further success peer."""
    failure: str = "\n\nA failed attempt, its result is wrong; avoid its mistake:\n\n{text}"
    """Every failure peer."""
    success_summary: str = "\n\nSummary of another correct solution: {text}"
    """Every success peer shown by its summary."""
    failure_summary: str = "\n\nSummary of a failed attempt: {text}"
    """Every failure peer shown by its summary."""
    feedback: str = "\n\nFeedback on an earlier failed attempt:\n\n{text}"
    """The verifier's feedback on the target itself."""
    closing: str = "\n\nNow solve the problem above correctly."
    """Ends the user turn of every context that has at least one section."""
    cut: str = "\n[...]\n"
    """Replaces the middle of a peer that is over its token budget."""

    @model_validator(mode="after")
    def _check_placeholders(self) -> Self:
        for name in set(Templates.model_fields) - {"closing", "cut"}:
            if getattr(self, name).count("{text}") != 1:
                raise ValueError(
                    f"peers.templates.{name}={getattr(self, name)!r}: write {{text}} exactly once, where the text goes"
                )
        return self


class PeersConfig(ConfigBlock):
    """What the teacher of a target rollout reads (paper eq. 4, 6, 7). The default is two successes and one failure."""

    successes: NonNegativeInt | Literal["all"] = 2
    """Success peers per context."""
    failures: NonNegativeInt | Literal["all"] = 1
    """Failure peers per context."""
    summaries: NonNegativeInt | Literal["all"] = 0
    """Further peers of either outcome, shown by what they wrote inside `<summary>` tags, or else by their first
    `max_summary_tokens` tokens. Ask for summaries with `data.prompt_suffix`."""
    order: Literal["canonical", "random", "shortest", "diverse"] = "canonical"
    """Which peers come first. `canonical`: sampling order, chosen once per group, so that most targets share one
    context, and those who are in it read the next in line; `shortest`: fewest tokens first, `diverse`: unlike each
    other first, both once per group; `random`: a seeded draw for each target."""
    min_successes: NonNegativeInt = 1
    """A target with fewer success peers than this is treated by `when_no_success`. Ignored when `successes` is 0."""
    when_no_success: Literal["skip", "failure_only", "feedback", "plain"] = "skip"
    """For a target with too few success peers: `skip` gives no signal (and costs no teacher or student pass),
    `failure_only` shows the failures alone, `feedback` shows the verifier's feedback on the target (without any: skip),
    `plain` shows nothing (context-free distillation; pointless with a live self-teacher)."""
    control: Literal["none", "random_peer", "unrelated_prompt", "success_only"] = "none"
    """Matched-budget controls: as many peers under the same headings, nearest in length to those they replace.
    `random_peer`: any of the group, whatever their outcome; `unrelated_prompt`: of other problems of the step, with the
    same outcome; `success_only`: successes in place of failures, from other problems when the group has no more."""
    strip_thinking_successes: bool = True
    """Remove thinking blocks from success peers."""
    strip_thinking_failures: bool = True
    """Remove thinking blocks from failure peers."""
    max_peer_tokens: PositiveInt = 2048
    """A longer peer loses its middle."""
    max_summary_tokens: PositiveInt = 64
    """A longer summary is cut at its end."""
    max_context_tokens: PositiveInt = 10240
    """Budget of the whole teacher prompt; peers shrink to fit. Question, closing and assistant header are never cut."""
    templates: Templates = Templates()
    """The text around the peers."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.successes == 0 and self.failures == 0:
            raise ValueError("peers.successes=0 and peers.failures=0 show the teacher no peers: raise one of them")
        if isinstance(self.successes, int) and 0 < self.successes < self.min_successes:
            raise ValueError(
                f"peers.min_successes={self.min_successes} can never be met with peers.successes={self.successes}: "
                "lower the first or raise the second"
            )
        return self


class TeacherConfig(ConfigBlock):
    """Whose distribution the student follows."""

    kind: Literal["live", "ema", "frozen", "external", "none"] = "ema"
    """`live`: the student itself; `ema`: a moving average of it; `frozen`: its initial weights; `external`: `path`;
    `none`: no teacher. Default: `ema` for mopd and sdpo, `external` for opd and gkd, `frozen` for dpo (its reference
    model), else `none`."""
    ema_rate: Fraction = 0.05
    """After each step: teacher ← (1 - rate)·teacher + rate·student. The average is kept in float32."""
    path: str | None = None
    """Model directory or hub name of an external teacher; it must have the student's vocabulary."""

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        if self.kind == "external" and self.path is None:
            raise ValueError("teacher.kind=external needs teacher.path: name the teacher's model directory")
        if self.kind != "external" and self.path is not None:
            raise ValueError(
                f"teacher.path={self.path!r} is unused by teacher.kind={self.kind}: set teacher.kind=external"
            )
        return self


class DivergenceConfig(ConfigBlock):
    """The token-level loss between student P and teacher Q (paper appendix B)."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """`forward_kl` KL(Q‖P), `reverse_kl` KL(P‖Q) (the paper's choice for maths), or `jsd`."""
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """For `jsd`: M = (1-α)P + αQ and D = (1-α)·KL(P‖M) + α·KL(Q‖M)."""
    support: Literal["full", "student_topk", "teacher_topk", "sampled"] = "student_topk"
    """The tokens compared: the whole vocabulary, the k likeliest of the student or teacher, or the sampled one
    (reverse KL only)."""
    k: PositiveInt = 100
    """Size of a top-k support; a smaller vocabulary is taken whole."""
    tail: bool = True
    """Count the probability outside the top-k as one more token. False renormalises inside the top-k."""

    @model_validator(mode="after")
    def _check_sampled(self) -> Self:
        if self.support == "sampled" and self.kind != "reverse_kl":
            raise ValueError(
                f"divergence.support=sampled estimates the reverse KL, not {self.kind}: set divergence.kind=reverse_kl"
            )
        return self


class PolicyGradientConfig(ConfigBlock):
    """Clipped policy gradient on group-relative advantages: grpo's objective, and an extra term for mopd."""

    weight: NonNegativeFloat = 0.0
    """For mopd: the step's loss is divergence + weight · policy gradient. 0: distillation alone."""
    clip_low: Fraction = 0.2
    """Ratios below 1 - clip_low are clipped. Bites only from the second update of a step on."""
    clip_high: NonNegativeFloat = 0.28
    """Ratios above 1 + clip_high are clipped."""
    divide_by_std: bool = False
    """Divide each group's advantages by their standard deviation."""


class DpoConfig(ConfigBlock):
    """Direct preference optimisation on pairs of a success and a failure of one group."""

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference model."""


class SimpoConfig(ConfigBlock):
    """Reference-free preference optimisation on the same pairs as dpo."""

    beta: PositiveFloat = 2.0
    """Scale of the mean log-probabilities."""
    margin: NonNegativeFloat = 1.0
    """γ: by how much the success should lead."""


class GkdConfig(ConfigBlock):
    """Offline distillation: the student is fitted to completions that the teacher wrote."""

    completions: str | None = None
    """File with the teacher's completions of all training problems, written by `mopd complete`."""


class OptimizerConfig(ConfigBlock):
    """AdamW with linear warm-up and a constant rate."""

    learning_rate: PositiveFloat = 1e-5
    """Rate after warm-up."""
    warmup_steps: NonNegativeInt = 10
    """Step s uses rate·min(1, s / warmup_steps), s from 1: the first update is not wasted on rate 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled; on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm. A non-finite norm skips the update and is counted."""


class TrainConfig(ConfigBlock):
    """The loop."""

    num_steps: PositiveInt = 100
    """Training steps in all."""
    eval_every: NonNegativeInt = 5
    """Evaluate every so many steps, and before the first and after the last. 0: never."""
    checkpoint_every: PositiveInt = 50
    """Save every so many steps, and at the end and when interrupted."""
    keep_checkpoints: PositiveInt = 2
    """Older checkpoints are deleted."""
    checkpoint_must_save_by: Duration | None = None
    """`"DD:HH:MM:SS"` after the start of the process, for a job with a time limit: the run saves and stops, as when
    interrupted, if its next step and the save after it might end later. How long they take is the longest of the last
    ten; the first save of a process counts as nothing, so leave room for it. Default: no such moment."""
    num_updates_per_step: PositiveInt = 1
    """The rows of a step are cut into so many mini-batches, one optimiser update each."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """`token_mean`: mean over all response tokens of an update; `sequence_mean`: mean over responses of their means."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Tokens that go through a model at once in an update; scoring, which keeps no gradients, takes four times as many
    (`engine: local`). For `engine: nemo`, on each data-parallel rank."""

    @property
    def must_save_by_seconds(self) -> float:
        """`checkpoint_must_save_by` as a number; infinity without one."""
        return math.inf if self.checkpoint_must_save_by is None else seconds_of(self.checkpoint_must_save_by)


class EvalConfig(ConfigBlock):
    """Held-out evaluation."""

    num_samples: PositiveInt = 8
    """Responses per problem: the n of mean@n, and the largest k of pass@k."""
    temperature: PositiveFloat = 0.6
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Nucleus sampling threshold; 1 switches it off."""


class LoggingConfig(ConfigBlock):
    """Trackers beside `metrics.jsonl`, which is always written."""

    tensorboard: bool = False
    """Write TensorBoard events into the run directory."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases mode."""
    wandb_project: str = "mopd-nemo"
    """Weights & Biases project."""
    save_rollouts_every: NonNegativeInt = 1
    """Write `rollouts/step_*.jsonl` every so many steps. 0: never."""


class Config(ConfigBlock):
    """A whole run."""

    name: str = "mopd"
    """Name of the run, used for its directory and in trackers."""
    run_dir: str | None = None
    """Run directory. Default: `runs/<name>-<date>-<time>`."""
    seed: NonNegativeInt = 0
    """The one seed: data order, sampling, peer choice."""
    method: str = "mopd"
    """Training method: `mopd`, `sdpo`, `opd`, `gkd`, `grpo`, `dpo`, `simpo`, `verified_sft`, or `module:Name` for your
    own. The only difference between two runs that compare methods."""
    engine: Literal["local", "nemo"] = "local"
    """What runs the models: `local` is one process with torch and transformers, `nemo` a cluster with NeMo-RL."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    generation: GenerationConfig = GenerationConfig()
    verifier: VerifierConfig = VerifierConfig()
    peers: PeersConfig = PeersConfig()
    teacher: TeacherConfig = TeacherConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    dpo: DpoConfig = DpoConfig()
    simpo: SimpoConfig = SimpoConfig()
    gkd: GkdConfig = GkdConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    logging: LoggingConfig = LoggingConfig()
    nemo: NemoConfig = NemoConfig()
    cluster: ClusterConfig = ClusterConfig()
