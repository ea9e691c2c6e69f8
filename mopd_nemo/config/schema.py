"""Every setting and its default: one pydantic tree that refuses unknown keys.

Defaults are the paper's (section 5.1) where it states them. `docs/configuration.md` is generated from the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mopd_nemo.config.base import ConfigBlock, Duration, Fraction, seconds_of
from mopd_nemo.config.cluster import ClusterConfig, NemoConfig
from mopd_nemo.config.peers import FeedbackConfig, LeakConfig, PeersConfig
from mopd_nemo.config.teacher import NamedTeacherConfig, ReferenceConfig, TeacherConfig
from mopd_nemo.config.verifiers import VerifierConfig


class ModelConfig(ConfigBlock):
    """The student."""

    path: str = "embedded:arithmetic"
    """Hugging Face model directory or hub name; `embedded:arithmetic` is the tiny model that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision. What is trained, and its optimiser state, have the types of `optimizer`."""
    device: str = "auto"
    """`auto` (CUDA when there is one, else CPU), `cpu`, `cuda` or `cuda:N`."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, for student and teacher. For Qwen3, for example, `{enable_thinking: false}`."""
    end_tokens: tuple[str, ...] = ()
    """Tokens that end a response, in addition to the tokenizer's own. They must include the token that ends a turn in
    the chat template: base models often need `["<|im_end|>"]`."""


class LoraConfig(ConfigBlock):
    """Adapters beside a model that stays as it is: docs/one-gpu.md."""

    rank: NonNegativeInt = 0
    """Rows of each adapter's first matrix. Adapters are trained in float32; the model's own weights are kept in
    `model.dtype` alone. 0: no adapters, all weights are trained."""
    alpha: PositiveInt = 32
    """An adapter's output is multiplied by alpha / rank."""
    targets: Literal["all"] | tuple[str, ...] = "all"
    """Layers that get an adapter. `all`: every linear layer except the head. Names, such as `[q_proj, v_proj]`: the
    layers whose names end so. With `engine: nemo` the names are those of Megatron, such as `linear_qkv`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are 0 in an update, the others being larger in return. Nothing else drops any:
    neither samplers nor teachers nor evaluation."""


class DataConfig(ConfigBlock):
    """The problems."""

    train: str = "arithmetic"
    """`arithmetic` (built in) or a JSONL file with rows `{id, prompt or messages, answer, task}`."""
    eval: str = "arithmetic"
    """Held-out problems, in the same forms as `train`."""
    num_train: PositiveInt | None = None
    """Number of training problems to use, from the start of the file. `null`: all."""
    num_eval: PositiveInt | None = None
    """Number of held-out problems to use, from the start of the file. `null`: all."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Treatment of a malformed row in a JSONL file. `stop`: an error that names file, line and field. `skip`: a
    warning that does."""
    prompt_suffix: str = ""
    """Text appended to the user turn of every problem, in training and in evaluation."""
    train_prompt_suffix: str = ""
    """Text appended after `prompt_suffix` in training alone, such as a request for a summary."""
    privileged_column: str = "privileged"
    """Field of a row with text for the teacher alone, such as a reference solution, a hint or a document. Read where
    `context` names `privileged`; every row must then have it. The built-in task has worked solutions."""
    escape_control_tokens: bool = True
    """Break up control tokens of the tokenizer in the text of a row (`< |im_end|>`), so that a row cannot open or end
    a turn. `false`: for rows that hold templated text on purpose."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest allowed prompt. A longer one is an error that names the problem; prompts are never truncated."""


class RolloutConfig(ConfigBlock):
    """Sampling during training."""

    num_prompts_per_step: PositiveInt = 32
    """Problems per step."""
    num_rollouts_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Group size G of eq. 2. At least 2, because peers come from the same group."""
    max_response_tokens: PositiveInt = 4096
    """Longest response. One that reaches the limit is truncated and marked unfinished."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The loss compares student and teacher at temperature 1."""
    importance_clip: PositiveFloat | None = 2.0
    """Each token's loss is weighted by min(P(y) / the sampler's P(y), this value). It corrects the mismatch between
    sampler and trainer. `null`: no weights."""
    batch_size: PositiveInt = 256
    """Sequences decoded at once by the local engine."""
    lag: Literal[0, 1] = 0
    """Steps by which the sampler's weights may be older than the learner's. 0: a step draws its rollouts, then learns
    from them. 1: while a step learns, the next one's rollouts are drawn with the weights that it began with;
    `importance_clip` corrects for them, except in methods without it (dpo, simpo, verified_sft). A step then takes
    about the longer of the two, and a checkpoint waits for the rollouts in flight. With `engine: nemo` this needs
    `nemo.generation.gpus`; with `engine: local`, memory for a second copy of the weights."""


class GenerationConfig(ConfigBlock):
    """The sampler of `engine: local`. With `engine: nemo` vLLM samples; see `nemo.generation`."""

    backend: Literal["local", "vllm"] = "local"
    """`local`: the engine's own sampler. `vllm`: vLLM in the same process, with new weights after every update."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Fraction of GPU memory for vLLM's weights and cache. On CPUs, vLLM reads `VLLM_CPU_KVCACHE_SPACE` (GiB)."""


class GuardConfig(ConfigBlock):
    """Watching for signs that the run is being ruined: docs/preflight.md."""

    action: Literal["warn", "stop"] = "warn"
    """What follows when signs appear. `warn`: a line in the log and in the report. `stop`: also, the run ends and names
    the last good checkpoint. In both, that checkpoint is kept beside the newest ones."""


class DivergenceConfig(ConfigBlock):
    """The token-level loss between student P and teacher Q (paper appendix B)."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """`forward_kl` KL(Q‖P), `reverse_kl` KL(P‖Q) (the paper's choice for maths), or `jsd`."""
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """For `jsd`: M = (1-α)P + αQ and D = (1-α)·KL(P‖M) + α·KL(Q‖M)."""
    support: Literal["full", "student_topk", "teacher_topk", "sampled"] = "student_topk"
    """Tokens that are compared: the whole vocabulary, the k likeliest tokens of the student or of the teacher, or the
    sampled token (reverse KL only)."""
    k: PositiveInt = 100
    """Number of tokens in a top-k support; a smaller vocabulary is taken whole."""
    tail: bool = True
    """Treat the probability outside the top-k as one more token. `false`: renormalise inside the top-k."""
    weights: Literal["none", "sharper", "student_entropy", "teacher_certainty", "divergence"] = "none"
    """Weight of each token in the loss, from 0 to 1, with the entropies H of the n compared tokens (tail included).
    `sharper`: 1 where H(Q) < H(P), else 0. `student_entropy`: H(P) / ln n. `teacher_certainty`: 1 - H(Q) / ln n.
    `divergence`: 1 - exp(-D), with the token's own divergence D. A token of weight 0 stays in the mean."""
    entry_clip: PositiveFloat | None = None
    """Most that one token of the vocabulary adds to the divergence at one position, in nats, such as 0.05 in OPSD.
    `null`: no clip."""
    targets: Literal["all", "failures", "successes"] = "all"
    """Rollouts that are learned from: all, or those with this verdict. With `train.denominator: sampled` the others
    count in the mean with loss 0."""
    contrast: NonNegativeFloat = 0.0
    """β > 0: the teacher reads successes and failures in two prompts, and its distributions Q_S and Q_F after them make
    the target Q ∝ Q_S·(Q_S / Q_F)^β. A target without a failed peer learns from Q_S. 0: one prompt with both."""

    @model_validator(mode="after")
    def _check_contrast(self) -> Self:
        for name, default in (("weights", "none"), ("contrast", 0.0), ("entry_clip", None)):
            value = getattr(self, name)
            if value != default and self.support == "sampled":
                raise ValueError(
                    f"divergence.{name}={value} needs the distributions of several tokens, and divergence.support="
                    "sampled compares one: set divergence.support=student_topk or teacher_topk"
                )
        if self.entry_clip is not None and self.support == "full":
            raise ValueError(
                f"divergence.entry_clip={self.entry_clip} looks at each compared token by itself, of which "
                "divergence.support=full has too many: set divergence.support=student_topk or teacher_topk"
            )
        if self.contrast > 0 and self.support == "full":
            raise ValueError(
                f"divergence.contrast={self.contrast} would keep three whole vocabularies: set "
                "divergence.support=student_topk or teacher_topk"
            )
        return self

    @model_validator(mode="after")
    def _check_sampled(self) -> Self:
        if self.support == "sampled" and self.kind != "reverse_kl":
            raise ValueError(
                f"divergence.support=sampled estimates the reverse KL, not {self.kind}: set divergence.kind=reverse_kl"
            )
        return self


class SuppressConfig(ConfigBlock):
    """A control without a teacher: every unlikely token of the student's own responses is made less likely."""

    below: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """A token is unlikely if the student gives it less probability than this. It has the advantage -1, others 0."""


class PolicyGradientConfig(ConfigBlock):
    """Clipped policy gradient on group-relative advantages: grpo's objective, and an extra term for mopd."""

    weight: NonNegativeFloat = 0.0
    """For mopd: the step's loss is divergence + weight · policy gradient. 0: distillation alone."""
    clip_low: Fraction = 0.2
    """Ratios below 1 - clip_low are clipped. Has an effect from the second update of a step."""
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
    """γ: margin by which the success should lead."""


class GkdConfig(ConfigBlock):
    """Offline distillation: the student is fitted to completions that the teacher wrote."""

    completions: str | None = None
    """File with the teacher's completions of all training problems, written by `mopd complete`."""


class OptimizerConfig(ConfigBlock):
    """AdamW with linear warm-up and a constant rate."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Rate after warm-up. Adam moves each weight by about this much a step."""
    warmup_steps: NonNegativeInt = 10
    """Step s = 1, 2, … uses rate·min(1, s / warmup_steps), so the first update does not have rate 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, of matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm. A non-finite norm skips the update and is counted."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights. `bfloat16`: half the memory, and no float32 copy of them; updates are computed in
    float32 and rounded at random, with an unchanged mean. It needs `model.dtype: bfloat16` and `engine: local`."""
    moments: Literal["float32", "int8"] = "float32"
    """Type of AdamW's two averages. `int8`: 2 bytes a parameter in place of 8, by blocks of 256. It needs
    `engine: local`."""


class TrainConfig(ConfigBlock):
    """The loop."""

    num_steps: PositiveInt = 100
    """Number of training steps."""
    eval_every: NonNegativeInt = 5
    """Steps between evaluations; there is one before the first step and one after the last, too. 0: never evaluate."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints. The run also saves at its end and when it is stopped."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep. Older ones are deleted."""
    keep_best: str | None = None
    """Also keep the checkpoint of the best evaluation by this metric of `eval.jsonl`, such as `mean@8` or `pass@1`. It
    is written right after an evaluation that beats all before it, and takes room beside the newest ones; the
    evaluation before the first step does not count. `mopd eval --checkpoint RUN_DIR` takes it. `null`: none."""
    checkpoint_must_save_by: Duration | None = None
    """Deadline, counted from the start of the process, for a job with a time limit: `"hours:minutes:seconds"`, with
    days in front as `"1-12:00:00"` or as NeMo-RL's `"01:12:00:00"`. The run saves and stops if its next step and the
    save after it might end later, judged by the longest of the last ten. The first save cannot be predicted; leave
    time for it. `null`: no deadline."""
    num_updates_per_step: PositiveInt = 1
    """Number of mini-batches that a step is divided into, with one optimiser update each."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """`token_mean`: mean over all response tokens of an update. `sequence_mean`: mean over responses of their means."""
    denominator: Literal["taught", "sampled"] = "taught"
    """Responses in that mean, for methods that distil. `taught`: those with a teacher. `sampled`: all of the update, so
    that the loss shrinks with the share that is taught."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Tokens in one forward and backward pass of an update. Scoring keeps no gradients and takes twice as many, with
    `engine: local` four times the longest sequence if that is more, and with `engine: nemo` only where rows are packed.
    With `engine: nemo`, tokens on each data-parallel rank."""

    activation_checkpointing: bool = False
    """With `engine: local`, keep the input of each layer alone for the backward pass, which computes the rest again:
    far less memory, a third more arithmetic in an update, the same gradients. `engine: nemo` has
    `nemo.activation_checkpointing`."""

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
    """Nucleus sampling threshold. 1: off."""
    paper_metrics: bool = False
    """Also report `paper/mean@n` and `paper/pass@n`, which the paper's code calls mean@n and pass@n: a program scores
    the share of tests that it passes, and pass@n is drawn with replacement. For programs this needs
    `verifier.code.all_tests`."""

    @property
    def rates(self) -> tuple[str, ...]:
        """Metrics of an evaluation of which more is better."""
        n = self.num_samples
        as_in_paper = (f"paper/mean@{n}", f"paper/pass@{n}") if self.paper_metrics else ()
        return f"mean@{n}", *(f"pass@{k}" for k in pass_sizes(n)), f"maj@{n}", *as_in_paper


def pass_sizes(n: int) -> list[int]:
    """The k of pass@k for n samples: powers of two up to 64, and n."""
    return [k for k in (1, 2, 4, 8, 16, 32, 64) if k < n] + [n]


class LoggingConfig(ConfigBlock):
    """Trackers in addition to `metrics.jsonl`, which is always written."""

    tensorboard: bool = False
    """Write TensorBoard events into the run directory."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases mode."""
    wandb_project: str = "mopd-nemo"
    """Weights & Biases project."""
    track_groups_every: NonNegativeInt = 10
    """Steps between sample groups in the trackers, with verdicts and what their teachers read: a table in Weights &
    Biases, text in TensorBoard. Evaluations send some, too. 0: from evaluations alone."""
    save_rollouts_every: NonNegativeInt = 1
    """Steps between files `rollouts/step_*.jsonl`. 0: never write one."""
    save_token_signal_every: NonNegativeInt = 0
    """Steps between files `rollouts/signal_*.npz`: of each token that is learned from, what student and teacher say
    (`mopd inspect --tokens`). Costs one more pass of the student. 0: never write one. With engine=nemo only where
    workers keep hidden states: nemo.backend=megatron, and support=full, or student_topk with one update a step."""


class Config(ConfigBlock):
    """A whole run."""

    name: str = "mopd"
    """Name of the run, used for its directory and in trackers."""
    run_dir: str | None = None
    """Run directory. Default: `runs/<name>-<date>-<time>`."""
    seed: NonNegativeInt = 0
    """Seed of everything random: data order, sampling, peer selection."""
    method: str = "mopd"
    """Training method: `mopd`, `sdpo`, `opd`, `gkd`, `grpo`, `dpo`, `simpo`, `verified_sft`, `suppress`, or
    `module:Name` for your own. It is the only difference between two runs that compare methods."""
    engine: Literal["local", "nemo"] = "local"
    """`local`: one process with torch and transformers. `nemo`: a cluster with NeMo-RL."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    generation: GenerationConfig = GenerationConfig()
    verifier: VerifierConfig = VerifierConfig()
    context: tuple[str, ...] = ("peers",)
    """What the teacher reads beside the problem, in this order: `peers` of the group, the verifier's `feedback` on the
    target, the problem's `privileged` text (`data.privileged_column`), or what a function of yours returns, named
    `module:function`. See docs/contexts.md. Default: `[peers]`; for sdpo `[peers, feedback]`."""
    peers: PeersConfig = PeersConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    leak: LeakConfig = LeakConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[str, NamedTeacherConfig] = Field(default_factory=dict)
    """Several teachers by name, in place of `teacher`: blocks of its keys, with `kind` `frozen`, `external` or
    `server`, and `tasks`, the tasks that each one teaches. A row of the data may name its own with `teacher`."""
    guard: GuardConfig = GuardConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    reference: ReferenceConfig = ReferenceConfig()
    suppress: SuppressConfig = SuppressConfig()
    dpo: DpoConfig = DpoConfig()
    simpo: SimpoConfig = SimpoConfig()
    gkd: GkdConfig = GkdConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    logging: LoggingConfig = LoggingConfig()
    nemo: NemoConfig = NemoConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def teacher_reads(self) -> str:
        """The context in words."""
        peers = self.peers
        counted = f"{peers.successes} successes and {peers.failures} failures"
        words = {"peers": counted if peers.choose == "fixed" else "measured peers"}
        return ", ".join(words.get(source, source) for source in self.context)

    @property
    def every_teacher(self) -> Mapping[str, TeacherConfig]:
        """By name; the name of a single one is empty."""
        return self.teachers or {"": self.teacher}

    def has_teacher(self, *kinds: str) -> bool:
        """Whether one of them is of one of these kinds."""
        return any(teacher.kind in kinds for teacher in self.every_teacher.values())
