"""Hostile programs. None may change a verdict, hurt the host, reach another program or leave a process behind."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.sandbox.client import Run, Sandbox, SandboxError
from mopd_nemo.verifiers.sandbox.layers import LAYERS, LayerName, launches
from tests.verifiers.conftest import TIGHT, launch_of

ISOLATING = LAYERS[:2]


class Arena:
    """A sandbox under attack."""

    def __init__(self, layer: LayerName) -> None:
        self.sandbox = Sandbox(launch_of(layer), TIGHT)
        assert self.run("print('warm')").stdout == "warm\n"
        self.quiet = self.processes()

    def run(self, source: str, text: str = "") -> Run:
        with self.sandbox.program(source, None, "official") as program:
            return program.run(text)

    def processes(self) -> set[int]:
        """Host pids of the sandbox and of everything below it."""
        assert self.sandbox._process is not None
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text()
                except OSError:
                    continue
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
        found = {self.sandbox._process.pid}
        while below := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= below
        return found

    def assert_unharmed(self) -> None:
        """The same fork server serves the next program, and nothing else is alive."""
        run = self.run("print(6 * 7)")
        assert run.stdout == "42\n", run
        assert self.processes() == self.quiet


@pytest.fixture(scope="module", params=LAYERS)
def any_layer(request: pytest.FixtureRequest) -> Iterator[Arena]:
    arena = Arena(request.param)
    yield arena
    arena.sandbox.close()


@pytest.fixture(scope="module", params=ISOLATING)
def isolating(request: pytest.FixtureRequest) -> Iterator[Arena]:
    arena = Arena(request.param)
    yield arena
    arena.sandbox.close()


# --- exhausting the machine: every layer holds ------------------------------------------------------------------------

EXHAUSTING = {
    "fork bomb": ("import os\nwhile True: os.fork()", {"processes", "time", "error", "memory"}),
    "fork bomb behind the program's back": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True:\n        try: os.fork()\n"
        "        except OSError: pass\nwhile True: pass",
        {"processes", "time", "memory"},
    ),
    "thread bomb": (
        "import threading, time\nfor _ in range(5000): threading.Thread(target=time.sleep, args=(60,)).start()",
        {"processes", "time", "error", "memory"},
    ),
    "memory bomb": ("block = bytearray(10 << 30)", {"error"}),
    "memory bomb in small parts": (
        "parts = []\nwhile True: parts.append(bytearray(1 << 20))",
        {"error", "memory", "time"},
    ),
    "memory bomb over processes": (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0: break\n"
        "block = bytearray(os.urandom(1 << 20) * 100)\ntime.sleep(60)",
        {"memory", "time"},  # a busy machine has no memory for it in time
    ),
    "memory in files of no name": (
        "import os\nfiles = [os.memfd_create('x') for _ in range(9)]\nfor f in files * 99: os.write(f, bytes(1 << 20))",
        {"error"},
    ),
    "shared memory without a file": ("import mmap\nblock = mmap.mmap(-1, 100 << 20)", {"error"}),
    "output that is no text": (
        "import os\nfor fd in (1, 2, 3): os.write(fd, b'\\xff' * ((1 << 20) - 1))",
        {"encoding"},
    ),
    "endless output": ("while True: print('x' * 1000)", {"output"}),
    "endless output past Python": ("import os\nwhile True: os.write(1, b'x' * 100000)", {"output"}),
    "endless errors": ("import os\nwhile True: os.write(2, b'x' * 100000)", {"error"}),
    "huge file": ("with open('big', 'wb') as f:\n    while True: f.write(b'x' * 100000)", {"error"}),
    "endless loop": ("while True: pass", {"time"}),
    "endless sleep": ("import time\ntime.sleep(1000)", {"time"}),
    "endless loop that ignores signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        {"time"},
    ),
    "stopping itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", {"time"}),
    "crash": ("import ctypes\nctypes.string_at(0)", {"signal 11", "signal 7"}),
    "recursion": (
        "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
        {"error", "memory", "signal 11", "time"},
    ),
}


@pytest.mark.parametrize("name", EXHAUSTING)
def test_exhausting_attacks_end_and_leave_nothing(any_layer: Arena, name: str) -> None:
    source, endings = EXHAUSTING[name]
    started = time.monotonic()
    assert any_layer.run(source).ending in endings
    assert time.monotonic() - started < TIGHT.seconds_per_test + 2.0
    any_layer.assert_unharmed()


def test_a_daemon_dies_with_its_program(any_layer: Arena) -> None:
    run = any_layer.run(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n"
        "    os._exit(0)\nos.wait()\nprint('done')"
    )
    assert (run.ending, run.stdout) == ("normal", "done\n")
    any_layer.assert_unharmed()


def test_a_daemon_does_not_reach_the_next_test_of_its_program(any_layer: Arena) -> None:
    source = "import os, time\nprint(input())\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)"
    with any_layer.sandbox.program(source, None, "official") as program:
        assert [program.run(str(n)).stdout for n in range(3)] == ["0\n", "1\n", "2\n"]
    any_layer.assert_unharmed()


@pytest.mark.parametrize(
    ("source", "ending", "stdout"),
    [
        ("import os\nos._exit(0)", "normal", ""),
        ("import os\nprint('lost in the buffer')\nos._exit(0)", "normal", ""),
        ("import os\nprint('said', flush=True)\nos._exit(3)", "error", "said\n"),
        ("import os\nos.abort()", "signal 6", ""),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "signal 9", ""),
        ("import os\nos.close(1)", "normal", ""),
    ],
)
def test_leaving_early_is_reported_as_it_was(any_layer: Arena, source: str, ending: str, stdout: str) -> None:
    run = any_layer.run(source)
    assert (run.ending, run.stdout) == (ending, stdout)


def test_forged_messages_reach_nobody(any_layer: Arena) -> None:
    """A program writes what looks like a result on every descriptor it has; that is no more than printing it."""
    source = (
        "import os, json, struct\n"
        "forged = {'kind': 'result', 'id': 1, 'ending': 'normal', 'stdout': 'forged', 'value': '1'}\n"
        "body = json.dumps(forged).encode()\n"
        "for fd in range(3, 128):\n    try: os.write(fd, struct.pack('>I', len(body)) + body)\n    except OSError: pass"
    )
    with any_layer.sandbox.program(source, None, "official") as program:
        assert program.run("").stdout != "forged"
        assert program.run("").stdout != "forged"
    any_layer.assert_unharmed()


def test_a_test_announced_as_over_before_it_is_ends_all_the_same(any_layer: Arena) -> None:
    source = "import os, time\nos.write(25, b'0' * 5)\ntime.sleep(0.2)\nprint(input())"
    with any_layer.sandbox.program(source, None, "official") as program:
        assert "1" not in program.run("1").stdout
        assert program.run("2", fresh=True).ending == "normal"
    any_layer.assert_unharmed()


def test_what_holds_uncounted_memory_or_outlives_a_program_is_closed(any_layer: Arena) -> None:
    """Each answers "function not implemented", in a child process too. Threads, forks and programs go on as before."""
    if not any_layer.sandbox.filters:
        pytest.skip("this kernel has no filters of system calls")
    run = any_layer.run(
        "import ctypes, errno, os, subprocess, sys, threading\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "x86 = os.uname().machine == 'x86_64'\n"
        "calls = {'memfd_create': (319, 279), 'shmget': (29, 194), 'msgget': (68, 186), 'semget': (64, 190),\n"
        "    'add_key': (248, 217), 'keyctl': (250, 219), 'io_uring_setup': (425, 425), 'userfaultfd': (323, 282),\n"
        "    'bpf': (321, 280), 'perf_event_open': (298, 241), 'unshare': (272, 97), 'setns': (308, 268),\n"
        "    'clone3': (435, 435)}\n"
        "def open_calls():\n"
        "    for name, numbers in calls.items():\n"
        "        result = libc.syscall(numbers[not x86], 0, 0, 0, 0, 0)\n"
        "        if result != -1 or ctypes.get_errno() != errno.ENOSYS: yield name\n"
        "    if libc.syscall(56 if x86 else 220, 0x10000000 | 17, 0, 0, 0, 0) != -1: yield 'clone'\n"
        "print([*open_calls()], flush=True)\n"
        "thread = threading.Thread(target=lambda: print([*open_calls()], flush=True))\nthread.start()\nthread.join()\n"
        "if os.fork() == 0:\n    print([*open_calls()], flush=True)\n    os._exit(0)\nos.wait()\n"
        "print(subprocess.run([sys.executable, '-c', 'print(7)'], capture_output=True, text=True).stdout)"
    )
    assert run.stdout.split() == ["[]", "[]", "[]", "7"], run


def test_processes_share_what_python_shares(any_layer: Arena) -> None:
    """Through files in scratch memory, which is counted."""
    run = any_layer.run(
        "import multiprocessing\n"
        "def add(value):\n    with value.get_lock(): value.value += 1\n"
        "value = multiprocessing.get_context('fork').Value('i', 40)\n"
        "some = [multiprocessing.get_context('fork').Process(target=add, args=(value,)) for _ in range(2)]\n"
        "[p.start() for p in some]\n[p.join() for p in some]\nprint(value.value)"
    )
    assert run.stdout == "42\n", run


# --- reaching out of the sandbox: the isolating layers hold -----------------------------------------------------------


def test_nothing_outside_can_be_killed(isolating: Arena) -> None:
    run = isolating.run(
        "import os, signal\n"
        "for pid in [-1, os.getppid(), 1, *range(3, 400)]:\n"
        "    if pid != os.getpid():\n"
        "        try: os.kill(pid, signal.SIGKILL)\n        except OSError: pass\n"
        "print('alive')"
    )
    assert run.ending in {"normal", "signal 9"}  # kill(-1) spares pid 1 and the caller
    isolating.assert_unharmed()


def test_no_other_process_is_visible_or_readable(isolating: Arena) -> None:
    run = isolating.run(
        "import os\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    if int(pid) == os.getpid(): continue\n"
        "    for name in ('mem', 'environ', 'fd/0', 'fd/10', 'fd/11', 'root'):\n"
        "        try:\n            open(f'/proc/{pid}/{name}', 'rb').read(1)\n            print('read', pid, name)\n"
        "        except OSError: pass\n"
        "print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit())[-1] < 50)"
    )
    assert run.stdout == "True\n"


def test_the_host_is_neither_read_nor_written(isolating: Arena, tmp_path: Path) -> None:
    secret = tmp_path / "expected.json"
    secret.write_text("the expected answer")
    places = [
        str(secret),
        str(Path(__file__)),
        str(Path.home() / "x"),
        "/usr/x",
        "/etc/passwd",
        "/sandbox/inside/x",
        "/x",
    ]
    run = isolating.run(
        f"import os\nfor path in {places!r}:\n"
        "    for mode in ('r', 'w'):\n"
        "        try:\n            open(path, mode).close()\n            print(mode, path)\n"
        "        except OSError: pass\n"
        "print(os.environ.get('SECRET_OF_THE_HOST'), 'end')"
    )
    assert run.stdout == "None end\n"
    assert secret.read_text() == "the expected answer"
    assert not Path("/usr/x").exists() and not (Path.home() / "x").exists()


def test_the_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HOST", "token")
    arena = Arena(next(layer for layer in LAYERS if launch_of(layer)))
    try:
        assert "token" not in arena.run("import os\nprint(dict(os.environ))").stdout
    finally:
        arena.sandbox.close()


def test_no_network(isolating: Arena) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        run = isolating.run(
            f"import socket\nfor address in (('127.0.0.1', {port}), ('10.0.0.1', 80)):\n"
            "    try:\n        socket.create_connection(address, timeout=0.5)\n        print('connected')\n"
            "    except OSError: print('refused')"
        )
        assert run.stdout == "refused\nrefused\n"
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_socket_of_the_host_by_path(isolating: Arena, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        run = isolating.run(
            f"import socket\ns = socket.socket(socket.AF_UNIX)\ntry:\n    s.connect({path!r})\n    print('connected')\n"
            "except OSError: print('refused')"
        )
    assert run.stdout == "refused\n"


def test_programs_leave_nothing_to_each_other(isolating: Arena) -> None:
    first = isolating.run(
        "import os\nfor path in ('/tmp/left', '/dev/shm/left', '/dev/left', '/left', '/sandbox/left'):\n"
        "    try:\n        open(path, 'w').close()\n        print(path)\n    except OSError: pass\n"
        "import builtins, json\nbuiltins.print = None\njson.dumps = None"
    )
    assert first.stdout == "/tmp/left\n/dev/shm/left\n"
    run = isolating.run("import os, json\nprint(os.listdir('/tmp'), os.listdir('/dev/shm'), json.dumps(1))")
    assert run.stdout == "[] [] 1\n"


def test_no_privileges_are_left_or_gained(isolating: Arena) -> None:
    run = isolating.run(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "status = dict(line.split(':\\t', 1) for line in lines if ':\\t' in line)\n"
        "print({status[name] for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')}, status['NoNewPrivs'])\n"
        "print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''), libc.sethostname(b'x', 1), libc.chroot(b'/tmp'))"
    )
    assert run.stdout == "{'0000000000000000'} 1\n-1 -1 -1\n"


def test_all_of_python_is_there(any_layer: Arena) -> None:
    run = any_layer.run("import socket, sqlite3, unittest, xml.dom, numpy\nprint(numpy.arange(3).sum())")
    assert (run.stdout, run.stderr) == ("3\n", "")


def test_zeros_can_be_read_and_not_mapped(isolating: Arena) -> None:
    run = isolating.run(
        "import mmap, os\nfile = os.open('/dev/zero', os.O_RDWR)\nprint(os.read(file, 2))\n"
        "try: mmap.mmap(file, 4096)\nexcept OSError: print('not mapped')"
    )
    assert run.stdout == "b'\\x00\\x00'\nnot mapped\n"


def test_scratch_space_is_limited(isolating: Arena) -> None:
    run = isolating.run(
        "try:\n    for n in range(100): open(f'part{n}', 'wb').write(b'x' * 1000000)\n"
        "except OSError as e: print(e.errno)"
    )
    assert run.stdout == "28\n"


def test_expected_outputs_are_not_in_the_sandbox() -> None:
    """Of everything sent into the sandbox, nothing holds an expected output."""
    from mopd_nemo.config.verifiers import VerifierConfig
    from mopd_nemo.verifiers.code import CodeVerifier

    layer = next(layer for layer in LAYERS if launch_of(layer))
    verifier = CodeVerifier(VerifierConfig(code=TIGHT.model_copy(update={"sandbox": layer})))
    sent: list[dict[str, object]] = []
    send = verifier._sandbox.send
    verifier._sandbox.send = lambda message: (sent.append(message), send(message))[1]  # type: ignore[method-assign]
    try:
        verdict = verifier.judge(
            "```python\nprint(input())\n```", {"inputs": ["question"], "outputs": ["expected-answer"]}, True
        )
    finally:
        verifier.close()
    assert verdict.outcome is Outcome.WRONG
    assert "question" in str(sent) and "expected-answer" not in str(sent)


def test_killing_the_verifier_kills_the_sandbox(any_layer: Arena) -> None:
    """Whatever runs the sandbox may be killed at any moment, and takes it along."""
    source = f"""
import sys
from mopd_nemo.config.verifiers import CodeConfig
from mopd_nemo.verifiers.sandbox.client import Sandbox
from mopd_nemo.verifiers.sandbox.layers import Launch
launch = {any_layer.sandbox._launch!r}
sandbox = Sandbox(launch, CodeConfig(seconds_per_test=60))
with sandbox.program("import time\\nopen('started', 'w')\\ntime.sleep(60)", None, "official") as program:
    print(sandbox._process.pid, flush=True)
    program.run("")
"""
    import signal
    import subprocess
    import sys

    verifier = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert verifier.stdout is not None
    root = int(verifier.stdout.readline())
    time.sleep(0.3)
    verifier.send_signal(signal.SIGKILL)
    verifier.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{root}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{root}").exists()
    assert os.getpid()


@pytest.mark.parametrize("layer", LAYERS)
def test_every_way_to_start_a_layer_works_or_fails_at_once(layer: LayerName) -> None:
    """Also those that a machine falls back from, such as a user who cannot read this Python."""
    for launch in launches(layer, TIGHT):
        sandbox = Sandbox(launch, TIGHT)
        try:
            with sandbox.program("print(1)", None, "official") as program:
                program.run("")
        except SandboxError as error:
            assert "in time" not in str(error), launch
        finally:
            sandbox.close()
