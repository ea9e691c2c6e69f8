"""Which layer this machine offers: each is tried for real, best first."""

from __future__ import annotations

from dataclasses import dataclass

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import CodeConfig
from mopd_nemo.verifiers.sandbox.client import Sandbox, SandboxError
from mopd_nemo.verifiers.sandbox.layers import LAYERS, Launch, LayerName, launches

_PROBE = "import sched\nprint(6 * 7)"
"""Also imports a module that the fork server has not: programs must be able to read Python's library."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A layer that works here, and why better ones do not."""

    layer: LayerName
    launch: Launch
    passed_over: dict[str, str]

    def __str__(self) -> str:
        why = "".join(f"; no {layer}: {reason}" for layer, reason in self.passed_over.items())
        return f"{self.layer}{why}"


def choose(config: CodeConfig) -> Choice:
    """The layer that `verifier.code.sandbox` asks for; `auto` takes the best that isolates.

    Raises:
        UserError: it does not work here.
    """
    key = f"verifier.code.sandbox={config.sandbox}"
    wanted = LAYERS[:2] if config.sandbox == "auto" else (config.sandbox,)
    reasons: dict[str, str] = {}
    for layer in wanted:
        launch = try_layer(layer, config)
        if isinstance(launch, Launch):
            return Choice(layer, launch, reasons)
        reasons[layer] = launch
    why = "; ".join(f"{layer}: {reason}" for layer, reason in reasons.items())
    raise UserError(
        f"{key}: model-written code cannot be isolated here ({why}). Install bubblewrap, or allow user namespaces "
        "(in a container, its seccomp profile may forbid them), or accept resource limits alone, without protection of "
        "files and network, with verifier.code.sandbox=rlimits"
    )


def try_layer(layer: LayerName, config: CodeConfig) -> Launch | str:
    """A launch that runs a program here; else the reason why there is none."""
    reason = "bwrap is not on PATH"
    for launch in launches(layer, config):
        sandbox = Sandbox(launch, config)
        try:
            with sandbox.program(_PROBE, None, "official") as program:
                run = program.run("")
        except SandboxError as error:
            reason = str(error)
            continue
        finally:
            sandbox.close()
        if run.stdout == "42\n":
            return launch
        reason = f"a program ended with {run.ending}: {run.stderr}"
    return reason
