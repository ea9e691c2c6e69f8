"""The layers of isolation, best first: bubblewrap, own namespaces, resource limits alone.

| layer      | files                   | network | other processes | limits |
|------------|-------------------------|---------|-----------------|--------|
| bubblewrap | read-only Python, no more | none    | invisible       | yes    |
| namespaces | read-only Python, no more | none    | invisible       | yes    |
| rlimits    | all that the user may see | open    | visible         | yes    |

In the first two every program also gets its own pid namespace and its own scratch directory in memory. The third only
prevents accidents, and must be chosen by name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import CodeConfig
from mopd_nemo.verifiers.sandbox.client import Launch, Sandbox, SandboxError

LayerName = Literal["bubblewrap", "namespaces", "rlimits"]
LAYERS: tuple[LayerName, ...] = ("bubblewrap", "namespaces", "rlimits")

INSIDE = Path(__file__).parent / "inside"
"""The programs that run in the sandbox."""
_PROBE = "import sched\nprint(6 * 7)"
"""Imports a module that the fork server has not loaded: programs must be able to read Python's library."""
PACKAGES = ("numpy", "sortedcontainers")
"""Packages beside the standard library that programs may import, where installed."""
_NOBODY = 65534
_OWN_USERS = 1 << 30
"""User numbers from here on belong to no account."""
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime")
_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_KILL")
"""Needed by the fork server to give each program namespaces and take its privileges. Programs have none."""
_BUBBLEWRAP_END = ("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # else each thread reserves 64 MB of address space, which is limited
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A layer that works here, and why better ones do not."""

    layer: LayerName
    launch: Launch
    passed_over: dict[str, str]

    def __str__(self) -> str:
        why = "".join(f"; no {layer}: {reason}" for layer, reason in self.passed_over.items())
        return f"{self.layer}{why}{'' if self.launch.filters else '; no filter of system calls: this kernel has none'}"


def choose(config: CodeConfig) -> Choice:
    """The layer that `verifier.code.sandbox` asks for; `auto` takes the best that isolates.

    Raises:
        UserError: it does not work here.
    """
    key = f"verifier.code.sandbox={config.sandbox}"
    wanted = LAYERS[:2] if config.sandbox == "auto" else (config.sandbox,)
    reasons: dict[str, str] = {}
    for layer in wanted:
        tried = try_layer(layer, config)
        if isinstance(tried, Launch):
            return Choice(layer, tried, reasons)
        reasons[layer] = tried
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
            return replace(launch, filters=sandbox.filters)
        reason = f"a program ended with {run.ending}: {run.stderr}"
    return reason


def launches(layer: LayerName, config: CodeConfig) -> list[Launch]:
    """Ways to start the fork server in a layer, best first. It depends on the machine which of them work."""
    # Root's programs run as a user of their own in each sandbox, because limits on processes count by user. Where there
    # are only some users, they get a user namespace, in which counting begins anew.
    own = _OWN_USERS + secrets.randbelow(1 << 30)
    users = [own, None, _NOBODY] if os.geteuid() == 0 else [None]
    match layer:
        case "bubblewrap":
            return [_bubblewrap(config, uid) for uid in users] if shutil.which("bwrap") is not None else []
        case "namespaces":
            return [_namespaces(config, uid) for uid in users]
        case "rlimits":
            # Without a user namespace; as root itself only where nobody else can read this Python.
            users = sorted(users, key=lambda uid: uid is None)
            commands = [_fork_server(config, isolated=False, uid=uid) for uid in users]
            return [Launch(tuple(command), _ENVIRONMENT, isolated=False) for command in commands]


def _bubblewrap(config: CodeConfig, uid: int | None) -> Launch:
    mounts = [word for source, target in _mounts() for word in ("--ro-bind", source, target)]
    above = {str(parent): None for _, target in _mounts() for parent in reversed(Path(target).parents[:-1])}
    # bubblewrap itself would create these directories readable by root only.
    parents = [word for path in above for word in ("--perms", "0755", "--dir", path)]
    variables = [word for name, value in _ENVIRONMENT.items() for word in ("--setenv", name, value)]
    capabilities = [word for name in _CAPABILITIES for word in ("--cap-add", name)]
    command = [
        *("bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *(["--unshare-user"] if uid is None else []),
        *("--die-with-parent", "--clearenv", *variables, "--cap-drop", "ALL", *capabilities, "--chdir", "/"),
        *parents,
        *mounts,
        *_BUBBLEWRAP_END,
        *_fork_server(config, isolated=True, uid=uid),
    ]
    return Launch(tuple(command), dict(os.environ))


def _namespaces(config: CodeConfig, uid: int | None) -> Launch:
    plan = {
        "mounts": _mounts(),
        "own_user": uid is None,
        "command": _fork_server(config, isolated=True, uid=uid),
        "environment": _ENVIRONMENT,
    }
    return Launch((_python(), "-sSB", str(INSIDE / "namespaces.py"), json.dumps(plan)), _ENVIRONMENT)


def _fork_server(config: CodeConfig, *, isolated: bool, uid: int | None) -> list[str]:
    parents = sorted({str(path.parent) for path in _packages()})
    own_user = uid is not None and uid >= _OWN_USERS
    options = {
        "isolate": isolated,
        "uid": uid,
        "paths": ["/sandbox/packages"] if isolated else parents,
        "packages": PACKAGES,
        "seconds": config.seconds_per_test,
        "memory_bytes": config.memory_mb << 20,
        "output_bytes": config.output_mb << 20,
        "scratch_bytes": config.scratch_mb << 20,
        "processes": config.processes,
        "own_user": own_user,
        # Else the limit counts others' processes, too: those of everybody's `nobody`, of this user, on older kernels
        # those outside the user namespace.
        "limit_processes": own_user or (uid is None and isolated and _kernel() >= (5, 14)),
    }
    script = "/sandbox/inside/fork_server.py" if isolated else str(INSIDE / "fork_server.py")
    return [_python(), "-sSB", script, json.dumps(options)]


def _mounts() -> list[tuple[str, str]]:
    """Read-only (source, target): the system's libraries, this Python, the allowed packages, the fork server."""
    paths = [path for path in _SYSTEM if Path(path).exists()]
    prefix = os.path.realpath(sys.base_prefix)
    if not any(prefix == path or prefix.startswith(f"{path}/") for path in paths):
        paths.append(prefix)
    mounts = [(os.path.realpath(path), path) for path in paths]
    mounts += [(str(path), f"/sandbox/packages/{path.name}") for path in _packages()]
    return [*mounts, (str(INSIDE), "/sandbox/inside")]


def _packages() -> list[Path]:
    """Directories of the allowed packages that are installed, and of the libraries that wheels put beside them."""
    found: list[Path] = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            package = Path(next(iter(spec.submodule_search_locations)))
            found += [path for path in (package, package.with_name(f"{name}.libs")) if path.is_dir()]
    return found


def _python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(sys.executable)


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)))
