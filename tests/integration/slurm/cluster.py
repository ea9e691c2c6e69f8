"""A real Slurm on this machine: munge, slurmctld, and a slurmd for each virtual node.

Every node has a network namespace with an address of its own and a hostname of its own, so that several Ray nodes with
the same ports live side by side. They share the file system, and with `hide` one of them can lose sight of a directory.
Needs root, and the packages slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins, munge and iproute2.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
_CONF = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/slurmctld.log
StateSaveLocation={dir}/state
SlurmdPidFile={dir}/%n.pid
SlurmdLogFile={dir}/%n.log
SlurmdSpoolDir={dir}/spool-%n
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
EnforcePartLimits=ALL
InactiveLimit=0
KillWait=3
MinJobAge=3600
AccountingStorageType=accounting_storage/none
PlugStackConfig={dir}/plugstack.conf
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes=ALL AllowAccounts=nobody-here State=UP
"""


@dataclass
class Node:
    """A virtual node."""

    name: str
    address: str
    namespace: str
    daemon: subprocess.Popen[bytes] | None = None

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command where the node's processes live."""
        assert self.daemon is not None
        inside = ["nsenter", f"--target={self.daemon.pid}", "--net", "--uts", "--mount"]
        return subprocess.run([*inside, *command], capture_output=True, text=True, check=True)

    def processes(self) -> list[int]:
        """All that run on the node."""
        return _processes(self.namespace)

    def kill(self, pattern: str) -> int:
        """Kill at once the node's processes whose command line has `pattern` in it; how many there were."""
        killed = 0
        for pid in self.processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if pattern in command:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
        return killed


@dataclass
class SlurmCluster:
    """Start with `start`, and `stop` whatever happens."""

    directory: Path
    nodes: list[Node] = field(default_factory=list)
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, num_nodes: int, cpus: int) -> None:
        """Up to an idle state of all nodes."""
        remove_orphans()
        prefix = f"mopd{os.getpid()}"
        subnet = _free_subnet()
        self._address = f"{subnet}.1"
        self.nodes = [Node(f"node{i}", f"{subnet}.{10 + i}", f"{prefix}-{i}") for i in range(1, num_nodes + 1)]
        self._configure(cpus)
        self._network(prefix)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={self.directory}/munge.key",
            f"--socket={self.directory}/munge.socket", f"--pid-file={self.directory}/munged.pid",
            f"--log-file={self.directory}/munged.log", f"--seed-file={self.directory}/munged.seed",
        )  # fmt: skip
        _wait("munge", lambda: (self.directory / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            setup = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -D -N "$1"'
            node.daemon = self._daemon(
                "nsenter", f"--net=/run/netns/{node.namespace}", "unshare", "--uts", "--mount", "--propagation=slave",
                "sh", "-c", setup, "sh", node.name, f"{self.directory}/hosts",
            )  # fmt: skip
        _wait("idle nodes", lambda: self._num_idle() == num_nodes)

    def stop(self) -> None:
        """End the daemons and everything on the nodes, and take the network away."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=5)
            except subprocess.TimeoutExpired:
                daemon.kill()
        _remove_network(f"mopd{os.getpid()}")

    def command(self, *command: str) -> str:
        """What a Slurm command prints."""
        answer = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False)
        return answer.stdout.strip()

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": f"{self.directory}/slurm.conf"}

    @property
    def knows_pyxis(self) -> bool:
        return (self.directory / "plugstack.conf").read_text() != ""

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        shown = self.command("scontrol", "show", "job", job)
        return next((word.split("=")[1] for word in shown.split() if word.startswith("JobState=")), "")

    def hide(self, node: Node, directory: Path) -> None:
        """Cover a directory with an empty one, for one node."""
        node.run("mount", "-t", "tmpfs", "tmpfs", str(directory))

    def show(self, node: Node, directory: Path) -> None:
        """Undo `hide`."""
        node.run("umount", str(directory))

    def _num_idle(self) -> int:
        for daemon in self._daemons:
            if daemon.poll() is not None:
                raise RuntimeError(f"{daemon.args} ended: see the logs in {self.directory}")
        return int(self.command("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "batch") or 0)

    def _configure(self, cpus: int) -> None:
        (self.directory / "state").mkdir(parents=True)
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        lines = [f"127.0.0.1 localhost\n{self._address} {host}"]
        conf = _CONF.format(host=host, address=self._address, port=_free_port(), dir=self.directory)
        for node in self.nodes:
            (self.directory / f"spool-{node.name}").mkdir()
            lines.append(f"{node.address} {node.name}")
            conf += f"NodeName={node.name} NodeAddr={node.address} Port=16918 CPUs={cpus} RealMemory=4000\n"
        (self.directory / "hosts").write_text("\n".join(lines) + "\n")
        (self.directory / "slurm.conf").write_text(conf)
        (self.directory / "plugstack.conf").write_text(_pyxis_stand_in(self.directory))

    def _network(self, prefix: str) -> None:
        self._bridge = f"{prefix}br"
        commands = [f"link add {self._bridge} type bridge", f"addr add {self._address}/24 dev {self._bridge}",
                    f"link set {self._bridge} up"]  # fmt: skip
        for number, node in enumerate(self.nodes):
            commands += [
                f"netns add {node.namespace}",
                f"link add {prefix}v{number} type veth peer name eth0 netns {node.namespace}",
                f"link set {prefix}v{number} master {self._bridge} up",
                f"-n {node.namespace} addr add {node.address}/24 dev eth0",
                f"-n {node.namespace} link set eth0 up",
                f"-n {node.namespace} link set lo up",
                f"-n {node.namespace} route add default via {self._address}",
            ]
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.directory / f"{Path(command[0]).name}-{len(self._daemons)}.out").open("wb")
        daemon = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
        self._daemons.append(daemon)
        return daemon


def remove_orphans() -> None:
    """Take away the networks of test runs that were killed: their addresses would lead packets astray."""
    names = {link["ifname"] for link in _ip_json("link")} | {entry["name"] for entry in _ip_json("netns")}
    owners = {match[1] for name in names if (match := re.match(r"mopd(\d+)(br$|v\d+$|-\d+$)", name))}
    for owner in owners:
        if not Path(f"/proc/{owner}").exists():
            _remove_network(f"mopd{owner}")


def missing() -> str | None:
    """Why no cluster can be started here, if none can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a virtual Slurm cluster needs Linux and root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        packages = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2"
        return f"no {', '.join(absent)} here: apt-get install --no-install-recommends {packages}"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "this machine allows no network namespaces"


def _pyxis_stand_in(directory: Path) -> str:
    """A plugin that knows pyxis' options and starts no container, where it can be built; else no plugin."""
    source = Path(__file__).with_name("pyxis_stand_in.c")
    if shutil.which("gcc") is None or not Path("/usr/include/slurm/spank.h").exists():
        return ""
    library = directory / "pyxis_stand_in.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return f"required {library}\n"


def _ip_json(what: str) -> list[dict[str, Any]]:
    shown = subprocess.run(["ip", "-json", what, "show"], capture_output=True, text=True, check=True).stdout
    return json.loads(shown or "[]")


def _free_subnet() -> str:
    """The first three numbers of a network that no interface of this machine has an address in."""
    taken = {entry["local"].rpartition(".")[0] for link in _ip_json("addr") for entry in link["addr_info"]}
    first = os.getpid()  # so that two that start at once choose differently
    return next(subnet for number in range(256) if (subnet := f"10.78.{(first + number) % 256}") not in taken)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _processes(namespace: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def _remove_network(prefix: str) -> None:
    """End what runs in the namespaces of this prefix, and delete them and the interfaces."""
    for name in [entry["name"] for entry in _ip_json("netns") if entry["name"].startswith(f"{prefix}-")]:
        for pid in _processes(name):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], check=False)
    for name in [link["ifname"] for link in _ip_json("link")]:
        if re.fullmatch(rf"{prefix}(br|v\d+)", name):
            subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


def _wait(what: str, test: object, seconds: float = 20) -> None:
    assert callable(test)
    deadline = time.monotonic() + seconds
    while not test():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {seconds} s")
        time.sleep(0.05)
