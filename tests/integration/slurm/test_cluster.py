"""The virtual cluster itself."""

from __future__ import annotations

import subprocess

import pytest

from tests.integration.slurm.cluster import missing, remove_orphans

pytestmark = pytest.mark.slow


def test_networks_of_killed_runs_are_removed() -> None:
    if (why := missing()) is not None:
        pytest.skip(why)
    ended = subprocess.Popen(["true"])
    ended.wait()
    bridge = f"mopd{ended.pid}br"
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    subprocess.run(["ip", "netns", "add", f"mopd{ended.pid}-1"], check=True)

    remove_orphans()

    shown = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    namespaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert bridge not in shown and f"mopd{ended.pid}-" not in namespaces
