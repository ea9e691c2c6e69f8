"""The warm interpreter of the sandbox: it imports what programs use once, then forks for every program and every test.

It is started by the layers of `mopd_nemo.verifiers.sandbox`, inside the sandbox, and speaks length-prefixed JSON on its
stdin and stdout. Standard library only. The processes, where the layer isolates programs from each other:

    zygote            reads one program; forks
      keeper          leaves the zygote's pid, mount and IPC namespaces; forks
        server        pid 1 of the new pid namespace; own /tmp and /proc; reads tests; forks
          test        limits, no privileges, candidate's code

Nothing of a program outlives its server: when pid 1 ends the kernel kills the rest. Between tests the server kills
everything but itself. Expected outputs never come here.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Iterable

sys.path[0] = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120

import program
import system

WARM = """
abc array ast bisect cmath collections collections.abc contextlib copy dataclasses datetime decimal enum fractions
functools heapq io itertools json math numbers operator queue random re statistics string threading time traceback
types typing
""".split()

_CONTROL_IN, _CONTROL_OUT = 10, 11


# --- frames ----------------------------------------------------------------------------------------------------------


def _read_exactly(count: int) -> bytes:
    chunks = []
    while count:
        chunk = os.read(_CONTROL_IN, min(count, 1 << 20))
        if not chunk:
            os._exit(0)  # the verifier is gone
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def receive() -> dict:
    (length,) = struct.unpack(">I", _read_exactly(4))
    return json.loads(_read_exactly(length))


def send(message: dict) -> None:
    body = json.dumps(message).encode()
    data = memoryview(struct.pack(">I", len(body)) + body)
    while data:
        data = data[os.write(_CONTROL_OUT, data) :]


# --- one program -----------------------------------------------------------------------------------------------------


def keep(request: dict, options: dict) -> None:
    """The keeper: put a server for this program into namespaces of its own."""
    system.die_with_parent(signal.SIGKILL)
    if not options["isolate"]:
        system.adopt_orphans()
        serve(request, options)
        return
    system.unshare(system.CLONE_NEWNS | system.CLONE_NEWPID | system.CLONE_NEWIPC)
    server = os.fork()
    if server == 0:
        system.die_with_parent(signal.SIGKILL)
        system.mount("none", "/", flags=system.MS_REC | system.MS_PRIVATE)
        scratch = f"size={options['scratch_bytes']},nr_inodes=10000,mode=1777"
        system.mount("tmpfs", "/tmp", "tmpfs", system.MS_NOSUID | system.MS_NODEV, scratch)
        system.mount("/tmp", "/dev/shm", flags=system.MS_BIND)
        system.mount("proc", "/proc", "proc", system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC)
        serve(request, options)
    os.waitpid(server, 0)


def serve(request: dict, options: dict) -> None:
    """Run tests until told to stop."""
    # Not warm in the zygote: a fork takes twice as long with numpy in memory.
    _import_all(name for name in options["packages"] if name in request["source"])
    os.chdir("/tmp" if options["isolate"] else request["scratch"])
    limits = _limits(options)
    while (test := receive())["kind"] == "test":
        send({"id": request["id"], "kind": "result", **run_test(request, test, options, limits)})


# --- one test --------------------------------------------------------------------------------------------------------


def run_test(request: dict, test: dict, options: dict, limits: dict) -> dict:
    """Fork, run the candidate on one input, kill what is left of it, and say what came out."""
    stdin, stdout, stderr, result = (os.memfd_create(name) for name in ("stdin", "stdout", "stderr", "result"))
    if request["function"] is None:
        os.write(stdin, test["input"].encode("utf-8", "surrogateescape"))
        os.lseek(stdin, 0, os.SEEK_SET)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_test(request, test, options["uid"], limits, (stdin, stdout, stderr, result))
    ending = _wait(child, started + options["seconds"], options)
    seconds = time.monotonic() - started
    status = _kill_rest(child, options)
    limit = options["output_bytes"]
    answer = {
        "ending": ending or _ending(status),
        "seconds": seconds,
        "stdout": _read_back(stdout, limit),
        "stderr": _read_back(stderr, limit)[-4000:],
        "value": _read_back(result, limit),
    }
    if os.fstat(stdout).st_size >= limit or os.fstat(result).st_size >= limit:
        answer |= {"ending": "output", "stdout": answer["stdout"][:4000], "value": ""}
    for fd in (stdin, stdout, stderr, result):
        os.close(fd)
    return answer


def _become_test(request: dict, test: dict, uid: "int | None", limits: dict, fds: tuple) -> None:
    """Give the candidate its streams, take everything else, and run it. Does not return."""
    status = 120
    try:
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        os.closerange(4, 256)
        for kind, limit in limits.items():
            resource.setrlimit(kind, (limit, limit))
        system.drop_privileges(uid)
        system.hide_from_peers(False)
        system.die_with_parent(signal.SIGKILL)
        gc.enable()
        status = program.run(request["source"], request["function"], test["input"], request["rules"], BUILTINS)
    finally:
        os._exit(status)


def _limits(options: dict) -> dict:
    """The resource limits of a test; memory counts from what the interpreter has mapped already."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_CPU: int(options["seconds"]) + 1,
        resource.RLIMIT_AS: mapped + options["memory_bytes"],
        resource.RLIMIT_FSIZE: options["output_bytes"],
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
    }
    return limits | ({resource.RLIMIT_NPROC: options["processes"]} if options["limit_processes"] else {})


def _wait(child: int, deadline: float, options: dict) -> str:
    """Until the child ends ("") or breaks a limit that only an onlooker sees ("time", "memory", "processes")."""
    pidfd = os.pidfd_open(child)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    pause = 5
    ending = ""
    while not ending and not poller.poll(pause):
        pause = min(pause * 2, 20)
        ending = "time" if time.monotonic() > deadline else _excess(options)
    os.close(pidfd)
    return ending


def _excess(options: dict) -> str:
    """What all processes of the test together use too much of, if anything."""
    pids = _others() if options["isolate"] else _descendants(os.getpid())
    if len(pids) > options["processes"]:
        return "processes"
    pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", encoding="ascii") as file:  # noqa: PTH123
                _, resident, shared, *_ = map(int, file.read().split())
        except OSError:
            continue  # it has just ended
        pages += resident - shared if len(pids) > 1 else resident
    return "memory" if pages * resource.getpagesize() > options["memory_bytes"] else ""


def _kill_rest(child: int, options: dict) -> int:
    """Kill and reap every process of the test; the wait status of its first one."""
    status = 0
    while True:
        if options["isolate"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # pid 1 itself is not hit
        else:
            for pid in _descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            pid, ended = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if pid == child:
            status = ended


def _others() -> list:
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid != 1]  # noqa: PTH208


def _descendants(root: int) -> list:
    children: dict = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208
        try:
            with open(f"/proc/{pid}/stat", encoding="latin-1") as file:  # noqa: PTH123
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(pid))
    found: list = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "time" if number == signal.SIGXCPU else f"signal {number}"
    return "normal" if os.WEXITSTATUS(status) == 0 else "error"


def _read_back(fd: int, limit: int) -> str:
    return os.pread(fd, limit, 0).decode("utf-8", "replace")


# --- start -----------------------------------------------------------------------------------------------------------


def _import_all(names: "Iterable[str]") -> None:
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main() -> None:
    """Serve programs until the verifier goes away."""
    options = json.loads(sys.argv[1])
    system.die_with_parent(signal.SIGKILL)
    os.dup2(0, _CONTROL_IN, inheritable=False)
    os.dup2(1, _CONTROL_OUT, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.path += options["paths"]
    _import_all(WARM)
    BUILTINS.update(program.extended_builtins())
    system.forbid_new_privileges()
    gc.disable()
    gc.freeze()  # forks then share these pages
    system.hide_from_peers()
    send({"kind": "ready"})
    while True:
        request = receive()
        keeper = os.fork()
        if keeper == 0:
            status = 1
            try:
                keep(request, options)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(keeper, 0)
        send({"id": request["id"], "kind": "done", "status": status})


BUILTINS: dict = {}

if __name__ == "__main__":
    main()
