"""A verdict does not depend on the programs that are judged at the same time."""

import pytest

from mopd_nemo.config.verifiers import CodeConfig, VerifierConfig
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.pool import VerifierPool
from mopd_nemo.verifiers.sandbox.layers import LayerName

THREADS = """
import threading, time
n = int(input())
done = []
def work():
    time.sleep(0.5)
    done.append(1)
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(n + len(done) - 16)
"""
FORK_BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""


def verdicts(layer: LayerName, workers: int, programs: int) -> list[Outcome]:
    """Of programs with 16 threads each, among them one that forks without end."""
    code = CodeConfig(sandbox=layer, processes=32, seconds_per_test=10.0)
    sources = [THREADS] * programs
    sources.insert(programs // 2, FORK_BOMB)
    with VerifierPool(VerifierConfig(code=code, workers=workers), ["code"]) as pool:
        answer = {"inputs": ["5"], "outputs": ["5"]}
        futures = [pool.submit("code", f"```python\n{source}\n```", answer) for source in sources]
        return [future.result().outcome for future in futures]


def test_a_fork_bomb_and_many_threads_beside_right_programs(layer: LayerName) -> None:
    found = verdicts(layer, workers=5, programs=10)
    assert found.pop(5) in (Outcome.WRONG, Outcome.TIMEOUT) and set(found) == {Outcome.CORRECT}


@pytest.mark.slow
def test_forty_workers_and_eighty_programs(best_layer: LayerName) -> None:
    found = verdicts(best_layer, workers=40, programs=80)
    assert found.pop(40) in (Outcome.WRONG, Outcome.TIMEOUT) and found == [Outcome.CORRECT] * 80
