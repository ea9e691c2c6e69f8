"""Which settings each method uses. Setting one that it does not use is an error, not silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """What a method makes of the sections that not every method uses."""

    teachers: tuple[str, ...]
    """Kinds of teacher it works with; the first is its default."""
    uses: frozenset[str]
    """Optional keys and whole sections that it reads."""


_DISTILLS = {"divergence", "rollout.importance_clip"}
_CLEANING = {"peers.order", "peers.templates", "peers.strip_thinking_successes"}

METHODS = {
    "mopd": MethodSettings(("ema", "live", "frozen", "external"), frozenset({"peers", "policy_gradient", *_DISTILLS})),
    "sdpo": MethodSettings(("ema", "live", "frozen", "external"), frozenset({*_CLEANING, *_DISTILLS})),
    "opd": MethodSettings(("external", "frozen"), frozenset(_DISTILLS)),
    "gkd": MethodSettings(("external",), frozenset({"gkd"})),
    "grpo": MethodSettings(("none",), frozenset({"policy_gradient", "rollout.importance_clip"})),
    "dpo": MethodSettings(("frozen", "external"), frozenset({"dpo"})),
    "simpo": MethodSettings(("none",), frozenset({"simpo"})),
    "verified_sft": MethodSettings(("none",), frozenset()),
}

_OPTIONAL = ("peers", "divergence", "policy_gradient", "gkd", "dpo", "simpo", "rollout.importance_clip")
"""What `MethodSettings.uses` is about; every method uses the rest."""
_BUDGETS = {"peers.max_context_tokens", "peers.max_peer_tokens", "peers.max_summary_tokens"}
"""Limits, not choices: a file that several methods share may set them for those that read peers."""


def check_method(config: Any) -> None:
    """Refuse what the method cannot use.

    Args:
        config: a `mopd_nemo.config.Config` whose sections have been checked one by one.

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    method, settings = config.method, METHODS[config.method]
    kind = config.teacher.kind
    if kind not in settings.teachers:
        raise ValueError(
            f"teacher.kind={kind} does not go with method={method}: it works with {' or '.join(settings.teachers)}"
        )
    if kind != "ema" and config.teacher.ema_rate != type(config.teacher).model_fields["ema_rate"].default:
        raise ValueError(f"teacher.ema_rate={config.teacher.ema_rate} is unused by teacher.kind={kind}: remove it")
    unused = [key for key in _changed(config) if _is_optional(key) and not _is_used(key, settings)]
    if method == "mopd" and config.policy_gradient.weight == 0:
        unused += [key for key in _changed(config) if key.startswith("policy_gradient.")]
    if method == "grpo" and config.policy_gradient.weight != 0:
        unused.append("policy_gradient.weight")
    if unused:
        key = unused[0]
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        raise ValueError(f"{key}={value!r} is unused by method={method}: remove it{_hint(key, method)}")


def _hint(key: str, method: str) -> str:
    if key.startswith("policy_gradient.") and method == "mopd":
        return ", or mix in the reward with policy_gradient.weight"
    users = [name for name, settings in METHODS.items() if name != method and _is_used(key, settings)]
    return f", or choose method={' or '.join(users)}" if users else ""


def _changed(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is not the default."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _changed(value, f"{prefix}{name}.")
        elif value != field.default:
            yield f"{prefix}{name}"


def _is_optional(key: str) -> bool:
    return key not in _BUDGETS and any(_within(key, optional) for optional in _OPTIONAL)


def _is_used(key: str, settings: MethodSettings) -> bool:
    return any(_within(key, used) for used in settings.uses)


def _within(key: str, scope: str) -> bool:
    return key == scope or key.startswith(f"{scope}.")
