"""A virtual Slurm cluster for the tests of this folder, and jobs on it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import QUICKSTART
from tests.integration.slurm.cluster import SlurmCluster, missing

SMALL = (
    "model.device=cpu",
    "rollout.num_prompts_per_step=4",
    "rollout.num_rollouts_per_prompt=4",
    "data.num_train=16",
    "data.num_eval=4",
    "eval.num_samples=2",
    "train.eval_every=0",
)


@dataclass
class Submission:
    """A submitted job, looked at from outside."""

    cluster: SlurmCluster
    directory: Path
    jobs: list[str]

    @property
    def job(self) -> str:
        return self.jobs[-1]

    def output(self) -> str:
        """What the batch step has printed, over all attempts."""
        return "".join(file.read_text() for file in sorted((self.directory / "job" / "logs").glob("slurm-*.out")))

    def log(self, name: str) -> str:
        """A file of the newest attempt."""
        file = self.directory / "job" / "logs" / "latest" / name
        return file.read_text() if file.exists() else ""

    def wait(self, *states: str, seconds: float = 60) -> str:
        """Until the last job is in one of these states, by default any final one."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_until(lambda: self.cluster.state(self.job) in wanted, seconds)
        return self.cluster.state(self.job)

    def wait_until(self, test: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not test():
            assert time.monotonic() < deadline, (
                f"{self.cluster.state(self.job)}\n{self.output()}{self.log('driver.log')}"
            )
            time.sleep(0.1)


@dataclass
class Launcher:
    """`mopd submit` against the cluster."""

    cluster: SlurmCluster
    directory: Path
    site: Path

    def try_submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mopd_nemo", "submit", "--config", str(QUICKSTART), "--site", str(self.site)]
        return subprocess.run(
            [*command, *SMALL, *arguments], capture_output=True, text=True, env=self.cluster.environment, check=False
        )

    def submit(self, *arguments: str) -> Submission:
        output = self.directory / "run"
        done = self.try_submit("--output", str(output), *arguments)
        assert done.returncode == 0, done.stderr
        jobs = [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("job ")]
        return Submission(self.cluster, output, jobs)

    def write_site(self, **keys: str) -> None:
        """The site file: this cluster, and what else is given."""
        lines = {"root": str(self.directory), "partition": "batch", **keys}
        self.site.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two nodes of two cores."""
    if (why := missing()) is not None:
        pytest.skip(why)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm") / "d")
    try:
        cluster.start(num_nodes=2, cpus=2)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def launcher(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Launcher]:
    """Real Python and, where it is installed, real Ray."""
    launcher = Launcher(slurm, tmp_path, tmp_path / "site.yaml")
    launcher.write_site(setup=f"export PATH={Path(sys.executable).parent}:$PATH", environment="{OMP_NUM_THREADS: '1'}")
    yield launcher
    for job in slurm.command("squeue", "-h", "-o", "%i").split():
        slurm.command("scancel", "--signal=KILL", "--full", job)
        slurm.command("scancel", job)


@pytest.fixture
def faked(launcher: Launcher) -> Launcher:
    """Fake `python` and `ray` on the nodes: everything between Slurm and the driver is real."""
    programs = launcher.directory / "bin"
    programs.mkdir()
    for name, source in (("python", "fake_python.sh"), ("ray", "fake_ray.sh")):
        program = programs / name
        program.write_text(Path(__file__).with_name(source).read_text())
        program.chmod(0o755)
    launcher.write_site(setup=f"export PATH={programs}:$PATH")
    return launcher
