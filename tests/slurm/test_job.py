import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.slurm.job import Job, mounts, parse_seeds, render
from mopd_nemo.slurm.site import SiteConfig
from tests.conftest import QUICKSTART


def make(*overrides: str, site: SiteConfig | None = None, **job: object) -> Job:
    base = Job(load_config(QUICKSTART, overrides), site or SiteConfig(root="/r"), Path("/r/run"), Path("/work dir"))
    return replace(base, **job)  # type: ignore[arg-type]


def directives(job: Job) -> list[str]:
    lines = [line.removeprefix("#SBATCH ") for line in render(job).splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)]


def test_local_engine_asks_for_one_gpu_of_one_node_or_none() -> None:
    assert "--gpus-per-node=1" in directives(make())
    assert not any("gpu" in line for line in directives(make("model.device=cpu")))
    assert "MOPD_RAY" not in render(make()) and "MOPD_RAY" in render(make("nemo.num_nodes=2"))


@pytest.mark.parametrize(
    ("request_", "line"), [("gpus-per-node", "--gpus-per-node=1"), ("gres", "--gres=gpu:1"), ("none", None)]
)
def test_gpus_are_asked_for_as_the_cluster_wants_it(request_: str, line: str | None) -> None:
    site = SiteConfig.model_validate({"gpu_request": request_})
    assert [found for found in directives(make(site=site)) if "gpu" in found] == ([line] if line else [])


def test_names_of_the_site_become_directives() -> None:
    site = SiteConfig(account="a", partition="p", qos="q", reservation="r", options=("--comment=x y",), exclusive=False)
    found = directives(make(site=site))
    assert {"--account=a", "--partition=p", "--qos=q", "--reservation=r", "--comment=x y"} <= set(found)
    assert "--exclusive" not in found


def test_signal_comes_so_long_before_the_limit_and_requeue_can_be_off() -> None:
    found = directives(make("cluster.stop_minutes=20", "cluster.time_limit=1-00:00:00"))
    assert {"--signal=B:USR1@1200", "--time=1-00:00:00", "--requeue", "--open-mode=append"} <= set(found)
    assert "--no-requeue" in directives(make("cluster.max_restarts=0"))
    assert "--time=01-12:00:00" in directives(make("cluster.time_limit=01:12:00:00")), "as NeMo-RL writes days"


def test_seeds_are_an_array_with_directories_of_their_own() -> None:
    job = make(seeds=(0, 7))
    assert "--array=0,7" in directives(job)
    assert "export MOPD_RUN_DIR=$MOPD_DIR/seed=$MOPD_SEED" in render(job)


@pytest.mark.parametrize("text", ["1,,2", "a", "1,1", "-1", ""])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_environment_of_the_submitter_stays_out_and_values_are_quoted() -> None:
    job = make(site=SiteConfig(environment={"NCCL_SOCKET_IFNAME": "eth0; rm -rf /"}))
    assert "--export=HOME,USER,PATH,LANG" in directives(job)
    script = render(job)
    assert "export NCCL_SOCKET_IFNAME='eth0; rm -rf /'" in script and "export MOPD_WORKDIR='/work dir'" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_container_sees_the_run_the_working_directory_and_the_cache() -> None:
    site = SiteConfig(root="/r", image="i", hf_home="/hf", mounts=("/data:/d",), node_mounts=("/raid",))
    assert mounts(make(site=site)) == [
        "/data:/d", "/raid:/raid", "/r:/r", "/work dir:/work dir", "/hf:/hf",
    ]  # fmt: skip
    script = render(make(site=site))
    assert "export MOPD_IMAGE=i" in script and "export HF_HOME=/hf" in script


def test_network_is_off_unless_the_site_says_otherwise() -> None:
    assert "export HF_HUB_OFFLINE=1" in render(make())
    assert "HF_HUB_OFFLINE" not in render(make(site=SiteConfig(offline=False)))
