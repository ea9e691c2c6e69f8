"""Worker modules are imported inside NeMo-RL's environments, where only torch and NeMo-RL are certain to be."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

BLOCKING = """
import importlib.machinery, sys, types
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
import mopd_nemo.engines.MODULE
"""


WORKERS = ROOT / "mopd_nemo" / "engines" / "nemo" / "workers"
WORKER_MODULES = [*(f"nemo.workers.{file.stem}" for file in sorted(WORKERS.glob("[!_]*.py"))), "vllm"]


@pytest.mark.parametrize("module", WORKER_MODULES)
def test_worker_modules_need_torch_and_nemo_rl_alone(module: str) -> None:
    code = BLOCKING.replace("MODULE", module)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
