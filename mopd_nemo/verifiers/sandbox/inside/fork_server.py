"""The warm interpreter of the sandbox: it imports what programs use once, then forks for every program and every test.

It is started by the layers of `mopd_nemo.verifiers.sandbox`, inside the sandbox, and speaks length-prefixed JSON on its
stdin and stdout. Standard library only. The processes, where the layer isolates programs from each other:

    fork server       reads one program; forks
      supervisor      leaves the fork server's pid, mount and IPC namespaces; forks
        server        pid 1 of the new pid namespace; own /tmp and /proc; reads tests; forks
          runner      limits, no privileges, candidate's code; runs tests until one spoils it

No process of a program outlives its server: when pid 1 ends, the kernel kills the rest. Expected outputs never enter
the sandbox.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import struct
import sys
from collections.abc import Iterable

sys.path[0] = os.path.dirname(os.path.abspath(__file__))

import linux
import syscalls
from rules import extended_builtins
from runner_process import RunnerProcess, limits_of

CONTROL_IN, CONTROL_OUT = 10, 11
"""Descriptors of the pipes to the verifier. Programs get 0 to 3."""
WARM = """
    abc array ast bisect cmath collections collections.abc contextlib copy dataclasses datetime decimal enum
    fractions functools heapq io itertools json math numbers operator queue random re statistics string threading
    time traceback types typing
    """.split()  # noqa: SIM905


def supervise(request: dict, options: dict) -> None:
    """The supervisor: put a server for this program into namespaces of its own."""
    linux.die_with_parent(signal.SIGKILL)
    if not options["isolate"]:
        linux.adopt_orphans()
        serve(request, options)
        return
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC)
    server = os.fork()
    if server == 0:
        linux.die_with_parent(signal.SIGKILL)
        linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
        scratch = f"size={options['scratch_bytes']},nr_inodes=10000,mode=1777"
        linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, scratch)
        linux.mount("/tmp", "/dev/shm", flags=linux.MS_BIND)
        # Reads the same. But /dev/zero can be mapped as shared memory, which nobody counts.
        linux.mount("/dev/full", "/dev/zero", flags=linux.MS_BIND)
        linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        serve(request, options)
        os._exit(0)
    os.waitpid(server, 0)


def serve(request: dict, options: dict) -> None:
    """Run tests until told to stop."""
    # Not in the fork server: with numpy in memory every fork takes twice as long.
    _import_all(name for name in options["packages"] if name in request["source"])
    os.chdir("/tmp" if options["isolate"] else request["scratch"])
    limits = limits_of(options)
    process = None
    while (test := receive())["kind"] == "test":
        if process is not None and test["fresh"]:
            process.end()
        if process is None or not process.alive:
            process = RunnerProcess(request, BUILTINS, options, limits)
        send({"id": request["id"], "kind": "result", **process.run(test["input"])})
    if process is not None:
        process.end()


def _import_all(names: "Iterable[str]") -> None:
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _read_exactly(count: int) -> bytes:
    chunks = []
    while count:
        chunk = os.read(CONTROL_IN, min(count, 1 << 20))
        if not chunk:
            os._exit(0)  # the verifier has ended
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def receive() -> dict:
    """The verifier's next message; ends this process when the verifier has ended."""
    (length,) = struct.unpack(">I", _read_exactly(4))
    return json.loads(_read_exactly(length))


def send(message: dict) -> None:
    """Send one message to the verifier."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")
    data = memoryview(struct.pack(">I", len(body)) + body)
    while data:
        data = data[os.write(CONTROL_OUT, data) :]


def main() -> None:
    """Serve programs until the verifier ends."""
    options = json.loads(sys.argv[1])
    linux.die_with_parent(signal.SIGKILL)
    os.dup2(0, CONTROL_IN, inheritable=False)
    os.dup2(1, CONTROL_OUT, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.path += options["paths"]
    _import_all(WARM)
    BUILTINS.update(extended_builtins())
    linux.forbid_new_privileges()
    gc.disable()
    gc.freeze()  # forks then share these pages
    linux.hide_from_peers()
    options["filter"] = syscalls.can_filter()
    send({"kind": "ready", "filter": options["filter"]})
    while True:
        request = receive()
        supervisor = os.fork()
        if supervisor == 0:
            status = 1
            try:
                supervise(request, options)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(supervisor, 0)
        send({"id": request["id"], "kind": "done", "status": status})


BUILTINS: dict = {}

if __name__ == "__main__":
    main()
