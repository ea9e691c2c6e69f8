"""The namespaces layer: build a root directory of read-only mounts, enter it, and start the zygote there.

What bubblewrap does for the layer of that name, for machines without it. Standard library only.
"""

import json
import os
import signal
import sys

sys.path[0] = os.path.dirname(os.path.abspath(__file__))

import system

_DEVICES = ("null", "zero", "full", "random", "urandom")


def main() -> None:
    """argv: JSON with `mounts` (source, target), `command` and `environment`, `own_user` (enter a user namespace)."""
    plan = json.loads(sys.argv[1])
    system.die_with_parent(signal.SIGKILL)
    flags = system.CLONE_NEWNS | system.CLONE_NEWPID | system.CLONE_NEWNET | system.CLONE_NEWIPC | system.CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    if plan["own_user"]:
        system.unshare(flags | system.CLONE_NEWUSER)
        _write("/proc/self/setgroups", "deny")
        # Root in there, as another user would lose every capability when the zygote is started.
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
    else:
        system.unshare(flags)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    system.die_with_parent(signal.SIGKILL)
    _enter(plan["mounts"])
    os.execve(plan["command"][0], plan["command"], plan["environment"])


def _enter(mounts: list) -> None:
    root = "/tmp"
    os.umask(0o022)
    system.mount("none", "/", flags=system.MS_REC | system.MS_PRIVATE)
    # Sources are opened before /tmp is covered: they may lie in it.
    opened = [(os.open(source, os.O_PATH), source, target) for source, target in mounts]
    devices = [(os.open(f"/dev/{name}", os.O_PATH), f"/dev/{name}", f"/dev/{name}") for name in _DEVICES]
    system.mount("tmpfs", root, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "size=1m,mode=755")
    for fd, source, target in opened:
        _bind(fd, source, root + target, read_only=True)
    for fd, source, target in devices:
        _bind(fd, source, root + target, read_only=False)
    for name in ("proc", "tmp", "dev/shm"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    system.mount("proc", f"{root}/proc", "proc", system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC)
    system.mount("none", root, flags=system.MS_REMOUNT | system.MS_BIND | system.MS_RDONLY)
    system.pivot_root(root)


def _bind(fd: int, source: str, target: str, read_only: bool) -> None:
    if os.path.isdir(f"/proc/self/fd/{fd}"):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    system.mount(f"/proc/self/fd/{fd}", target, flags=system.MS_BIND | system.MS_REC)
    if read_only:
        flags = system.MS_REMOUNT | system.MS_BIND | system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV
        system.mount("none", target, flags=flags | system.flags_of(target))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


if __name__ == "__main__":
    main()
