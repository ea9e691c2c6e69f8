"""Worker modules are imported inside NeMo-RL's environments, where only torch and NeMo-RL are certain to be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

BLOCKING = """
import importlib, importlib.machinery, json, os, sys, traceback, types
import torch.distributed.tensor  # torch itself is there, and looks around while it is imported

class Any(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Any(name, (), {})
    def __call__(cls, *args, **kwargs):
        return cls

class Strangers:
    def find_spec(self, name, path, target=None):
        root = name.split(".")[0]
        if root in ("nemo_rl", "megatron", "ray"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if root in ("pydantic", "omegaconf", "transformers", "rich", "typer", "jinja2", "matplotlib", "safetensors"):
            raise ModuleNotFoundError(f"{name} is not in a worker's environment")
        return None
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: Any(name, (), {})
        return module
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Strangers())
for module in sys.argv[1:]:
    child = os.fork()  # each begins with torch alone, which takes seconds to import
    if not child:
        try:
            importlib.import_module(f"mopd_nemo.engines.{module}")
        except BaseException:
            print(json.dumps([module, traceback.format_exc()]), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(json.dumps([module, f"status {status}" if status else ""]), flush=True)
"""


WORKERS = ROOT / "mopd_nemo" / "engines" / "nemo" / "workers"
WORKER_MODULES = [*(f"nemo.workers.{file.stem}" for file in sorted(WORKERS.glob("[!_]*.py"))), "vllm"]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What went wrong in the import of each module; empty: nothing."""
    command = [sys.executable, "-c", BLOCKING, *WORKER_MODULES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = dict.fromkeys(WORKER_MODULES, "")
    for module, failure in map(json.loads, done.stdout.splitlines()):
        found[module] += failure
    return found


@pytest.mark.parametrize("module", WORKER_MODULES)
def test_worker_modules_need_torch_and_nemo_rl_alone(module: str, failures: dict[str, str]) -> None:
    assert not failures[module], failures[module]
