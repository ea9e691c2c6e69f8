"""Rules between the blocks of a config: checks that need no model, file or GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from mopd_nemo.config.base import seconds_of
from mopd_nemo.config.checks_context import check_context
from mopd_nemo.config.checks_nemo import check_nemo
from mopd_nemo.config.cluster import keeps_hidden
from mopd_nemo.config.plugins import METHODS, method_class, recorded_method
from mopd_nemo.config.schema import Config
from mopd_nemo.config.teacher import TeacherConfig, key_of

OPTIONAL = (
    *(
        "context",
        "peers",
        "feedback",
        "leak",
        "divergence",
        "policy_gradient",
        "reference",
        "gkd",
        "dpo",
        "simpo",
        "suppress",
    ),
    *("data.privileged_column", "rollout.importance_clip", "train.denominator"),
)
"""Settings that not every method uses. Every method uses the others."""
BUDGETS = ("peers.max_context_tokens", "peers.max_peer_tokens", "peers.max_summary_tokens")
"""Limits, not choices. A file that several methods share may set them, also for methods without peers."""


def check(config: Config) -> None:
    """Refuse settings that cannot work together.

    Raises:
        ValueError: names the keys, their values and the remedy.
    """
    _check_method(config)
    _check_lora(config)
    _check_sampler(config)
    _check_optimizer(config)
    check_context(config)
    _check_teachers(config)
    _check_served(config)
    _check_lag(config)
    _check_token_signal(config)
    _check_best(config)
    _check_cluster(config)
    if config.engine == "nemo":
        check_nemo(config, teacher_prompt(config))


def teacher_prompt(config: Config) -> tuple[str, int]:
    """The key that limits a teacher's prompt, and its value."""
    if method_class(config.method).reads_peers:
        return "peers.max_context_tokens", config.peers.max_context_tokens
    return "data.max_prompt_tokens", config.data.max_prompt_tokens


def uses(method: str, key: str) -> bool:
    """Whether a method reads an optional setting."""
    return any(_within(key, scope) for scope in recorded_method(method).uses)


def is_unused(method: str, key: str) -> bool:
    """Whether a method cannot read a setting, which another method reads."""
    return _is_optional(key) and not uses(method, key)


def _check_method(config: Config) -> None:
    """Refuse settings that the method does not use."""
    method, kind = config.method, config.teacher.kind
    teachers = method_class(method).teachers
    if kind not in teachers and not (kind == "several" and "server" in teachers):
        raise ValueError(f"teacher.kind={kind} does not go with method={method}: it works with {' or '.join(teachers)}")
    if kind != "ema" and config.teacher.ema_rate != TeacherConfig.model_fields["ema_rate"].default:
        raise ValueError(f"teacher.ema_rate={config.teacher.ema_rate} is unused by teacher.kind={kind}: remove it")
    if not method_class(method).samples and config.gkd.completions is None:
        raise ValueError(
            f"method={method} learns from completions of its teacher: write them with "
            "`mopd complete --config CONFIG --output FILE` and set gkd.completions=FILE"
        )
    preset = method_class(method).preset
    for key, value in _changed(config, preset):
        if is_unused(method, key):
            shown = list(value) if isinstance(value, tuple) else value
            users = [name for name in METHODS if name != method and uses(name, key)]
            hint = f", or choose method={' or '.join(users)}" if users else ""
            raise ValueError(f"{key}={shown!r} is unused by method={method}: remove it{hint}")
    for key, value, beside, remedy in idle_settings(config):
        shown = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"{key}={shown!r} is unused by {beside}: remove it, or {remedy}")


def idle_settings(config: Config) -> Iterator[tuple[str, Any, str, str]]:
    """The settings that the method reads beside others than these: key, value, what leaves it idle, and a remedy."""
    method = method_class(config.method)
    idle = method.idle(config)
    for key, value in _changed(config, method.preset):
        if _is_optional(key):
            yield from ((key, value, *idle[scope]) for scope in idle if _within(key, scope))


def _check_lora(config: Config) -> None:
    if config.lora.rank:
        offloaded = [
            f"{key_of(name)}.offload"
            for name, teacher in config.every_teacher.items()
            if teacher.offload and teacher.kind in ("ema", "frozen")
        ] + ["reference.offload"] * config.reference.offload
        for key in offloaded:
            raise ValueError(
                f"{key}=true has no weights to move with lora.rank={config.lora.rank}: this model has the student's, "
                "with small adapters of its own or without: remove it"
            )
        return
    for key, value in _changed(config.lora, {}, "lora."):
        raise ValueError(f"{key}={value!r} is unused by lora.rank=0: set a rank, such as lora.rank=16, or remove it")


def _check_sampler(config: Config) -> None:
    if config.generation.backend == "vllm" or config.engine == "nemo":
        return
    for key, value in _changed(config.generation, {}, "generation."):
        raise ValueError(f"{key}={value!r} is unused by generation.backend=local: remove it, or choose backend=vllm")


def _check_optimizer(config: Config) -> None:
    """Types of weights and moments for one GPU that has to hold them all."""
    optimizer = config.optimizer
    for key in ("weights", "moments"):
        value = getattr(optimizer, key)
        if value == type(optimizer).model_fields[key].default:
            continue
        if config.engine == "nemo":
            raise ValueError(
                f"optimizer.{key}={value} is for engine=local; engine=nemo divides weights and moments among its GPUs, "
                "and nemo.offload_optimizer puts them aside: remove it"
            )
        if config.lora.rank:
            raise ValueError(
                f"optimizer.{key}={value}: lora.rank={config.lora.rank} trains adapters alone, which are small, in "
                "float32: remove it, or set lora.rank=0"
            )
    if optimizer.weights == "bfloat16" and config.model.dtype != "bfloat16":
        raise ValueError(
            f"optimizer.weights=bfloat16 leaves no float32 weights to compute with, and model.dtype="
            f"{config.model.dtype}: set model.dtype=bfloat16, or optimizer.weights=float32"
        )


def _changed(section: BaseModel, preset: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of the settings that are not at their default, nor at the method's own."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _changed(value, preset, f"{prefix}{name}.")
        elif f"{prefix}{name}" in preset:
            if value != preset[f"{prefix}{name}"]:
                yield f"{prefix}{name}", value
        elif value != field.default:
            yield f"{prefix}{name}", value


def _is_optional(key: str) -> bool:
    return not key.startswith(BUDGETS) and any(_within(key, scope) for scope in OPTIONAL)


def _within(key: str, scope: str) -> bool:
    return key == scope or key.startswith(f"{scope}.")


def _check_teachers(config: Config) -> None:
    """Several teachers stand in place of one, and no two of them teach the same task."""
    if (config.teacher.kind == "several") != bool(config.teachers):
        raise ValueError(
            f"teacher.kind={config.teacher.kind} with {len(config.teachers)} teachers: several are named in teachers, "
            "and teacher is then left out"
        )
    taught: dict[str, str] = {}
    for name, teacher in config.teachers.items():
        if teacher.ema_rate != TeacherConfig.model_fields["ema_rate"].default:
            raise ValueError(f"teachers.{name}.ema_rate={teacher.ema_rate} is unused by kind={teacher.kind}: remove it")
        for task in teacher.tasks or (name,):
            if task in taught:
                raise ValueError(
                    f"teachers.{name}.tasks: {task} is taught by teachers.{taught[task]} too; name it in one of them"
                )
            taught[task] = name


def _check_served(config: Config) -> None:
    """A server tells its likeliest tokens or the sampled one, and nothing of tokens that somebody else names."""
    if not config.has_teacher("server"):
        return
    divergence = config.divergence
    why = {
        "student_topk": "a server tells the teacher's likeliest tokens, not those that the student names",
        "full": "a server tells a few log-probabilities of each token, not the whole vocabulary's",
    }
    if divergence.support in why:
        raise ValueError(
            f"divergence.support={divergence.support} does not go with teacher.kind=server: {why[divergence.support]}. "
            "Set divergence.support=teacher_topk, or sampled with divergence.kind=reverse_kl"
        )
    if divergence.contrast:
        raise ValueError(
            f"divergence.contrast={divergence.contrast} asks what the teacher says of the same tokens after two "
            "prompts, which a served teacher cannot tell: set it to 0, or another teacher.kind"
        )
    if every := config.logging.save_token_signal_every:
        raise ValueError(
            f"logging.save_token_signal_every={every} needs a teacher's whole distribution, and teacher.kind=server "
            "tells a part of it: remove it"
        )


def _check_lag(config: Config) -> None:
    """Rollouts one step ahead need a sampler beside the learner, and weights that correct for their age."""
    if not config.rollout.lag:
        return
    method, generation = config.method, config.nemo.generation
    if not method_class(method).samples:
        raise ValueError(f"rollout.lag=1 is unused by method={method}, whose responses exist already: remove it")
    if uses(method, "rollout.importance_clip") and config.rollout.importance_clip is None:
        raise ValueError(
            "rollout.lag=1 learns from rollouts of weights one step old, and rollout.importance_clip=null does not "
            "correct for that: set a number, such as 2.0, or rollout.lag=0"
        )
    if config.engine == "nemo" and not generation.gpus:
        raise ValueError(
            "rollout.lag=1 draws rollouts while the student is scored and trained, and nemo.generation.gpus=0 has them "
            "take turns on the same GPUs: reserve some with nemo.generation.gpus, or set rollout.lag=0"
        )


def _check_token_signal(config: Config) -> None:
    every, support, updates = (
        config.logging.save_token_signal_every,
        config.divergence.support,
        config.train.num_updates_per_step,
    )
    distils = uses(config.method, "divergence.support")
    if every and config.engine == "nemo" and not (distils and keeps_hidden(config.nemo, support, updates)):
        raise ValueError(
            f"logging.save_token_signal_every={every}: with engine=nemo the signal is read from the teacher's hidden "
            "states, which workers keep with nemo.backend=megatron and divergence.support=full, or student_topk with "
            f"train.num_updates_per_step=1; here method={config.method}, nemo.backend={config.nemo.backend}, "
            f"divergence.support={support}, train.num_updates_per_step={updates}: change these, or remove it"
        )
    if every and config.teacher.kind == "none":
        raise ValueError(
            f"logging.save_token_signal_every={every}: method={config.method} has no teacher to compare with: remove it"
        )


def _check_best(config: Config) -> None:
    """The best checkpoint is chosen by something that evaluations measure."""
    metric, n, rates = config.train.keep_best, config.eval.num_samples, config.eval.rates
    if metric is not None and metric not in rates:
        raise ValueError(f"train.keep_best={metric}: with eval.num_samples={n} choose {', '.join(rates)}")
    if metric is not None and not config.train.eval_every:
        raise ValueError(f"train.keep_best={metric} needs evaluations, and train.eval_every=0: raise the latter")


def _check_cluster(config: Config) -> None:
    cluster = config.cluster
    if cluster.stop_minutes * 60 >= seconds_of(cluster.time_limit):
        raise ValueError(
            f"cluster.stop_minutes={cluster.stop_minutes} leaves nothing of cluster.time_limit={cluster.time_limit}: "
            "lower the first or raise the second"
        )
    last = cluster.port + 1799
    if cluster.port < 1024 or last > 65535:
        raise ValueError(f"cluster.port={cluster.port}: Ray would take ports up to {last}; choose 1024 to 63736")
