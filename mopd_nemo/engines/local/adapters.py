"""A directory with adapters: which model they belong to, and the model that both make.

adapter_config.json        of PEFT: rank, scale, layers, and the path of the base
adapter_model.safetensors  the adapters
base_model.json            the hash of the base's weights, and the type that they had in training
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from mopd_nemo.config import UserError
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.engines.models import ADAPTER_CONFIG, first_line

WEIGHTS, BASE = "adapter_model.safetensors", "base_model.json"
_HASHED_AT_ONCE = 4


def read_module(path: str, weights: torch.dtype) -> Any:
    """The causal LM of a model directory or hub name. Adapters are merged into the weights of their model."""
    directory = resolve_model_path(path)
    if (Path(directory) / ADAPTER_CONFIG).is_file():
        return load_merged(Path(directory), weights)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=weights)


def load_merged(directory: Path, weights: torch.dtype) -> Any:
    """The causal LM that a base and its adapters make, with one weight for each layer, of this type.

    Raises:
        UserError: the base cannot be loaded, or is not the one that the adapters were trained on.
    """
    from peft import PeftModel

    base = read_adapter_config(directory)["base_model_name_or_path"]
    dtype = _record(directory).get("dtype")
    remedy = f"put it back, or name it as base_model_name_or_path in {ADAPTER_CONFIG}"
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{directory}: the model of its adapters is not at {base}: {remedy}")
    try:
        module = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype) if dtype else weights)
    except Exception as error:  # damaged files make libraries raise anything
        raise UserError(
            f"{directory}: cannot load the model of its adapters, {base}: {first_line(error)}; {remedy}"
        ) from error
    check_base(directory, module)
    if (directory / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(directory)
    merged = PeftModel.from_pretrained(module.to(weights), str(directory)).merge_and_unload()
    return merged.requires_grad_(True)  # PEFT has frozen what is below adapters


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """What PEFT knows of the adapters."""
    return json.loads((directory / ADAPTER_CONFIG).read_text())


def write_base(directory: Path, fingerprint: str, dtype: torch.dtype) -> None:
    """Write down which weights are below the adapters, and their type."""
    record = {"dtype": str(dtype).removeprefix("torch."), "sha256": fingerprint}
    (directory / BASE).write_text(json.dumps(record, indent=1) + "\n")


def check_base(directory: Path, module: Any) -> None:
    """A model is the one below the adapters of a directory. One that is not ours does not tell, and passes.

    Raises:
        UserError: it is another one.
    """
    record = _record(directory)
    if record and fingerprint_of(module, getattr(torch, record["dtype"])) != record["sha256"]:
        path = read_adapter_config(directory)["base_model_name_or_path"]
        raise UserError(
            f"{directory}: its adapters belong to another base model than this one: to {path} as it was when they were "
            "trained; give them that one"
        )


def fingerprint_of(module: Any, dtype: torch.dtype) -> str:
    """The hash of all weights by name, after rounding them to a type."""

    def digest(item: tuple[str, Tensor]) -> str:
        name, weights = item
        content = weights.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy()
        return f"{name} {tuple(weights.shape)} {sha256(content.data).hexdigest()}\n"

    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return sha256("".join(pool.map(digest, module.named_parameters())).encode()).hexdigest()


def _record(directory: Path) -> dict[str, str]:
    file = directory / BASE
    return json.loads(file.read_text()) if file.is_file() else {}
