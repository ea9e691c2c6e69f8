"""The runner's process, from the side of the server that starts, watches and kills it.

Standard library only.
"""

import contextlib
import gc
import os
import resource
import select
import signal
import time

import linux
import runner
import syscalls


class RunnerProcess:
    """A process that runs one test after another, until one ends it or leaves something behind in it.

    Its streams are four files in memory, open on both sides. A byte on one pipe starts a test, and a byte on another
    reports its end. Whatever the candidate writes there, it gains no more than by printing.
    """

    def __init__(self, request: dict, known: dict, options: dict, limits: dict) -> None:
        self._options = options
        self._files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr", "value")]
        start, self._start = os.pipe()
        self._done, done = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            _become_runner(request, known, options, limits, [*self._files, start, done])
        os.close(start)
        os.close(done)
        self._pidfd = os.pidfd_open(self._process)
        self.fresh = True
        self.alive = True

    def run(self, text: str) -> dict:
        """Run one test and return its result. The runner may not be alive afterwards."""
        for file in self._files:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
        os.write(self._files[0], text.encode("utf-8", "surrogateescape"))
        os.lseek(self._files[0], 0, os.SEEK_SET)
        fresh, self.fresh = self.fresh, False
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            os.write(self._start, b"!")
        ending = self._wait(started + self._options["seconds"])
        if ending is None:
            ending = "normal" if os.read(self._done, 1) == b"0" else "error"
        else:
            self.alive = False
            status = _kill_all(self._process, self._options)
            ending = ending or _ending(status)
        result = self._result(ending, time.monotonic() - started)
        if not self.alive:
            self._close()
        return result | {"fresh": fresh}

    def end(self) -> None:
        """Kill and reap every process, if any is left."""
        if self.alive:
            self.alive = False
            _kill_all(self._process, self._options)
            self._close()

    def _close(self) -> None:
        for fd in (*self._files, self._start, self._done, self._pidfd):
            os.close(fd)

    def _result(self, ending: str, seconds: float) -> dict:
        limit = self._options["output_bytes"]
        _, stdout, stderr, value = self._files
        result = {"seconds": seconds, "stderr": _last(stderr)}
        if os.fstat(stdout).st_size >= limit or os.fstat(value).st_size >= limit:
            return result | {"ending": "output", "stdout": _first(stdout), "value": ""}
        try:
            return result | {"ending": ending, "stdout": _text(stdout, limit), "value": _text(value, limit)}
        except UnicodeDecodeError:
            # It equals no expected output, and to read it with replacements would take seconds.
            ending = "encoding" if ending == "normal" else ending
            return result | {"ending": ending, "stdout": _first(stdout), "value": ""}

    def _wait(self, deadline: float) -> "str | None":
        """None: the test has ended. "": its process has. Else the limit it broke: time, memory, processes."""
        poller = select.poll()
        poller.register(self._done, select.POLLIN)
        poller.register(self._pidfd, select.POLLIN)
        pause = 5
        while True:
            ready = dict(poller.poll(pause))
            if self._pidfd in ready:
                return ""
            if ready.get(self._done, 0) & select.POLLIN:
                return None
            if self._done in ready:  # closed: wait for the end of the process
                poller.unregister(self._done)
            pause = min(pause * 2, 20)
            broken = "time" if time.monotonic() > deadline else self._excess()
            if broken:
                return broken

    def _excess(self) -> str:
        """The limit that all processes of the test together exceed: processes, memory, or empty for none."""
        pids = _others() if self._options["isolate"] else _descendants(os.getpid())
        if len(pids) > self._options["processes"]:
            return "processes"
        pages = 0
        for pid in pids:
            try:
                with open(f"/proc/{pid}/statm", encoding="ascii") as file:
                    _, resident, shared, *_ = map(int, file.read().split())
            except OSError:
                continue  # it has ended meanwhile
            pages += resident - shared if len(pids) > 1 else resident
        return "memory" if pages * resource.getpagesize() > self._options["memory_bytes"] else ""


def _become_runner(request: dict, known: dict, options: dict, limits: dict, fds: list) -> None:
    """Give the candidate its streams and nothing else, and run it. Does not return."""
    status = 120
    try:
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, runner.FIRST_FD + target)
        os.closerange(4, runner.FIRST_FD)
        os.closerange(runner.FIRST_FD + len(fds), 512)
        for kind, limit in limits.items():
            resource.setrlimit(kind, limit)
        linux.drop_privileges(options["uid"])
        linux.hide_from_peers(False)
        linux.die_with_parent(signal.SIGKILL)
        if options["filter"]:
            syscalls.close_calls()
        gc.enable()
        status = runner.run_tests(request, known, options["seconds"])
    finally:
        os._exit(status)


def limits_of(options: dict) -> dict:
    """The resource limits of a runner. Memory is counted on top of what the interpreter has already mapped."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    seconds = int(options["seconds"]) + 1
    memory = mapped + options["memory_bytes"]
    limits = {
        resource.RLIMIT_CPU: (seconds, 100 * seconds),  # the runner raises the first one from test to test
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (options["output_bytes"], options["output_bytes"]),
        resource.RLIMIT_NOFILE: (128, 128),
        resource.RLIMIT_CORE: (0, 0),
    }
    if options["limit_processes"]:
        limits[resource.RLIMIT_NPROC] = (options["processes"], options["processes"])
    return limits


def _kill_all(child: int, options: dict) -> int:
    """Kill and reap every process but this one; the wait status of `child`."""
    status = 0
    while True:
        if options["isolate"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # pid 1 itself is not hit
        elif options["own_user"]:
            _kill_all_of(options["uid"])
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


def _kill_all_of(uid: int) -> None:
    """Kill every process of a user at once, as one of them: one by one, a fork bomb would outrun this."""
    status = 1
    while status:  # not 0: they have killed the killer first
        killer = os.fork()
        if killer == 0:
            try:
                os.setresuid(uid, uid, uid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)  # spares the caller
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(killer, 0)


def _others() -> list:
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid != 1]


def _descendants(root: int) -> list:
    children: dict = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
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


def _text(fd: int, limit: int) -> str:
    return os.pread(fd, limit, 0).decode()


def _first(fd: int) -> str:
    return os.pread(fd, 4000, 0).decode("utf-8", "replace")


def _last(fd: int) -> str:
    return os.pread(fd, 4000, max(0, os.fstat(fd).st_size - 4000)).decode("utf-8", "replace")
