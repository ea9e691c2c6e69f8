"""Wait until every node has joined Ray, then run one task on each: `python -m mopd_nemo.slurm.ray_nodes`.

The launcher runs it before the driver. It names a node that cannot run a task, cannot import this package or does not
see the shared log directory, before any model is loaded.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def main() -> int:
    """0 when all answered, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, required=True, help="nodes that must join")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of each")
    parser.add_argument("--seconds", type=float, required=True, help="how long to wait for them")
    parser.add_argument("--see", type=Path, required=True, help="a file that every node must see")
    wanted = parser.parse_args()
    ray.init(address="auto", log_to_driver=False, logging_level="warning")
    deadline = time.monotonic() + wanted.seconds
    nodes = _wait_for_nodes(wanted.nodes, deadline)
    if len(nodes) < wanted.nodes:
        print(f"only {len(nodes)} of {wanted.nodes} nodes have joined Ray: {', '.join(map(_name, nodes))}")
        return 1
    poor = [node for node in nodes if node["Resources"].get("GPU", 0) < wanted.gpus]
    for node in poor:
        print(f"node {_name(node)} has {node['Resources'].get('GPU', 0):.0f} GPUs, not {wanted.gpus}")
    return 1 if poor else _answer(nodes, str(wanted.see), deadline)


def _wait_for_nodes(number: int, deadline: float) -> list[dict[str, Any]]:
    seen = -1
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) != seen:
            seen = len(nodes)
            print(f"{seen} of {number} nodes have joined Ray", flush=True)
        if seen >= number or time.monotonic() > deadline:
            return nodes
        time.sleep(0.5)


def _answer(nodes: list[dict[str, Any]], file: str, deadline: float) -> int:
    """Print every node's answer. Returns 1 if one of them failed, else 0."""
    answers = {
        node["NodeID"]: _report.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(file)
        for node in nodes
    }
    failed = False
    for node in nodes:
        try:
            hostname, sees = ray.get(answers[node["NodeID"]], timeout=max(1.0, deadline - time.monotonic()))
        except (ray.exceptions.RayError, TimeoutError) as error:
            print(f"node {_name(node)} cannot run a task: {type(error).__name__}: {error}")
            failed = True
            continue
        print(f"node {hostname} answers{'' if sees else f', but does not see {file}: is it mounted there?'}")
        failed |= not sees
    return int(failed)


@ray.remote(num_cpus=0, max_retries=0)
def _report(file: str) -> tuple[str, bool]:
    import mopd_nemo  # noqa: F401  fails if the node cannot

    return socket.gethostname(), Path(file).exists()


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


if __name__ == "__main__":
    sys.exit(main())
