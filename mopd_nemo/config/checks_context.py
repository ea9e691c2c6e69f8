"""Rules about what the teacher reads: the sources of its context, the peers shown, and their measured choice."""

from __future__ import annotations

from mopd_nemo.config.peers import SOURCES
from mopd_nemo.config.plugins import context_function, method_class
from mopd_nemo.config.schema import Config


def check_context(config: Config) -> None:
    """Refuse contexts that show nothing, and settings of peers that cannot work together.

    Raises:
        ValueError: names the keys, their values and the remedy.
    """
    _check_sources(config)
    _check_peers(config)
    _check_choice(config)


def _check_sources(config: Config) -> None:
    context = config.context
    if not context:
        raise ValueError(f"context=[] shows the teacher nothing: name one of {', '.join(SOURCES)}, or set method=opd")
    for source in context:
        if context.count(source) > 1:
            raise ValueError(f"context=[{', '.join(context)}] names {source} twice: leave one out")
        if source not in SOURCES:
            context_function(source)
    if context == ("peers",):
        return
    shown = f"context=[{', '.join(context)}]"
    if config.divergence.contrast:
        raise ValueError(
            f"divergence.contrast={config.divergence.contrast} sets successful peers against failed ones, and {shown} "
            "has other sources: set context=[peers]"
        )


def _check_peers(config: Config) -> None:
    if config.peers.when_no_success == "plain" and config.teacher.kind == "live":
        raise ValueError(
            "peers.when_no_success=plain with teacher.kind=live compares the student with itself, a zero loss: "
            "set peers.when_no_success=skip, or another teacher.kind"
        )
    size = config.rollout.num_rollouts_per_prompt
    for name in ("successes", "failures", "summaries") if method_class(config.method).reads_peers else ():
        wanted = getattr(config.peers, name)
        if wanted != "all" and wanted > size:
            raise ValueError(
                f"peers.{name}={wanted} asks for more than the rollout.num_rollouts_per_prompt={size} rollouts of a "
                f"group: lower the first, raise the second, or set peers.{name}=all"
            )
    require, others = config.peers.require, config.rollout.num_rollouts_per_prompt - 1
    if require.successes + require.failures > others:
        raise ValueError(
            f"peers.require.successes={require.successes} and peers.require.failures={require.failures} ask for more "
            f"than the {others} rollouts beside a target: lower them or raise rollout.num_rollouts_per_prompt="
            f"{others + 1}"
        )
    if config.divergence.contrast and 0 in (config.peers.successes, config.peers.failures):
        raise ValueError(
            f"divergence.contrast={config.divergence.contrast} sets successes against failures, with peers.successes="
            f"{config.peers.successes} and peers.failures={config.peers.failures}: raise the one that is 0"
        )
    plain = {"when_no_success": "skip", "summaries": 0, "control": "none", "choose": "fixed"}
    for name, value in plain.items() if config.divergence.contrast else ():
        if getattr(config.peers, name) != value:
            raise ValueError(
                f"divergence.contrast={config.divergence.contrast} reads successes and failures of the group, each in "
                f"a prompt of their own, and does not go with peers.{name}={getattr(config.peers, name)}: set "
                f"peers.{name}={value}"
            )
    if config.divergence.contrast and config.peers.failure_form == "contrast":
        raise ValueError(
            f"divergence.contrast={config.divergence.contrast} shows failures without successes, which "
            "peers.failure_form=contrast compares them with: choose another form"
        )
    if method_class(config.method).reads_peers and config.peers.max_context_tokens <= config.data.max_prompt_tokens:
        raise ValueError(
            f"peers.max_context_tokens={config.peers.max_context_tokens} leaves no room for peers beside prompts of "
            f"up to data.max_prompt_tokens={config.data.max_prompt_tokens}: raise the first or lower the second"
        )


def _check_choice(config: Config) -> None:
    """Measured peers are those of a self-teacher, and what the choice would overrule stays at its default."""
    peers = config.peers
    if peers.choose == "fixed":
        for name in ("choose_every", "choose_from", "choose_problems"):
            if getattr(peers, name) != type(peers).model_fields[name].default:
                raise ValueError(f"peers.{name}={getattr(peers, name)!r} is unused by peers.choose=fixed: remove it")
        return
    if (kind := config.teacher.kind) in ("external", "server", "several"):
        raise ValueError(
            f"peers.choose=measured asks what the student makes of peers, and teacher.kind={kind} is another model: "
            "set peers.choose=fixed"
        )
    if peers.control != "none":
        raise ValueError(f"peers.choose=measured with peers.control={peers.control}: choose one of the two")
