"""The namespaces layer: build a root directory of read-only mounts, enter it, and start the fork server there.

For machines without bubblewrap, which does the same. Standard library only.
"""

import json
import os
import signal
import sys

sys.path[0] = os.path.dirname(os.path.abspath(__file__))

import linux

_DEVICES = ("null", "zero", "full", "random", "urandom")
_DESCRIPTORS = {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}
"""Links in /dev to a process's own descriptors."""


def main() -> None:
    """argv: JSON with `mounts` (source, target), `command` and `environment`, `own_user` (enter a user namespace)."""
    plan = json.loads(sys.argv[1])
    linux.die_with_parent(signal.SIGKILL)
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    if plan["own_user"]:
        linux.unshare(flags | linux.CLONE_NEWUSER)
        _write("/proc/self/setgroups", "deny")
        # Root inside, because another user would lose every capability when the fork server starts.
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
    else:
        linux.unshare(flags)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    linux.die_with_parent(signal.SIGKILL)
    _enter(plan["mounts"])
    os.execve(plan["command"][0], plan["command"], plan["environment"])


def _enter(mounts: list) -> None:
    root = "/tmp"
    os.umask(0o022)
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    # Open the sources before /tmp is covered: they may be inside it.
    opened = [(os.open(source, os.O_PATH), target) for source, target in mounts]
    devices = [(os.open(f"/dev/{name}", os.O_PATH), f"/dev/{name}") for name in _DEVICES]
    linux.mount("tmpfs", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for fd, target in opened:
        _bind(fd, root + target, read_only=True)
    for fd, target in devices:
        _bind(fd, root + target, read_only=False)
    for name in ("proc", "tmp", "dev/shm"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    for name, descriptor in _DESCRIPTORS.items():
        os.symlink(f"/proc/self/fd{descriptor}", f"{root}/dev/{name}")
    linux.mount("proc", f"{root}/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    linux.mount("none", root, flags=linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY)
    linux.pivot_root(root)


def _bind(fd: int, target: str, read_only: bool) -> None:
    if os.path.isdir(f"/proc/self/fd/{fd}"):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    linux.mount(f"/proc/self/fd/{fd}", target, flags=linux.MS_BIND | linux.MS_REC)
    if read_only:
        flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
        linux.mount("none", target, flags=flags | linux.flags_of(target))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


if __name__ == "__main__":
    main()
