"""LoRA: a model whose own weights stay as they are, and small matrices beside them that are trained, through PEFT.

An adapted layer computes W·x + scale·B·(A·x), with scale = alpha / rank. B begins at 0, A at random. In an update with
`lora.dropout`, A reads x with some of its numbers 0.

Shape suffixes: O outputs of a layer, I its inputs, R the rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mopd_nemo.config import Config, LoraConfig, UserError
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.engines.base import seed_of
from mopd_nemo.engines.local.adapters import (
    WEIGHTS,
    check_base,
    fingerprint_of,
    read_adapter_config,
    write_base,
)
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.engines.models import check_is_whole, load_model_config

_NAME = "default"
"""PEFT's name of the only adapter. It is no part of the keys in a file."""


class AdaptedModel(LanguageModel):
    """A model with adapters, which alone are trained. They are float32; all other weights keep the type they have.

    Args:
        base: shares its weights with this model, and is frozen.
        path: of the base, for checkpoints.
        seed: of the first matrices.

    Raises:
        UserError: a target is no linear layer of the base.
    """

    def __init__(self, base: LanguageModel, config: LoraConfig, path: str, seed: str) -> None:
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.base = base
        base.module.requires_grad_(False)
        self._peft = _peft_config(base, config, path)
        shared = {id(weights): weights for weights in base.module.parameters()}
        module = inject_adapter_in_model(self._peft, copy.deepcopy(base.module, shared), adapter_name=_NAME)
        for name, layer in module.named_modules():
            if isinstance(layer, LoraLayer):
                _initialise(layer, f"{seed}/lora/{name}")
                if config.dropout:
                    layer.lora_dropout[_NAME] = SeededDropout(config.dropout, name)
        super().__init__(module, base.dtype, recompute=base._recompute)

    def initial(self) -> LanguageModel:
        return self.base

    @contextmanager
    def dropping(self, seed: str) -> Iterator[None]:
        places = [module for module in self.module.modules() if isinstance(module, SeededDropout)]
        for place in places:
            place.seed = seed
        try:
            yield
        finally:
            for place in places:
                place.seed = None

    def sampled_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weights in self.base.module.named_parameters():
            layer, _, kind = name.rpartition(".")
            yield name, merged_weight(self.module.get_submodule(layer)) if kind == "weight" else weights

    def save(self, directory: Path) -> None:
        """A directory that PEFT loads, with the base's config, so that it also tells what model it is."""
        directory.mkdir(parents=True, exist_ok=True)
        adapters = {_key(name): weights.detach().contiguous() for name, weights in self._adapters().items()}
        save_file(adapters, directory / WEIGHTS, metadata={"format": "pt"})
        self._peft.save_pretrained(str(directory))
        self.base.module.config.save_pretrained(directory)
        self.base.module.generation_config.save_pretrained(directory)
        write_base(directory, self._fingerprint, next(self.base.module.parameters()).dtype)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        if not (directory / WEIGHTS).is_file():
            raise UserError(
                f"{directory}: holds all weights of a model and no adapters, and lora.rank={self._peft.r}: resume with "
                "lora.rank=0, or start a new run from it (model.path)"
            )
        saved = read_adapter_config(directory)
        saved["target_modules"] = set(saved["target_modules"])
        for key, name in (("rank", "r"), ("alpha", "lora_alpha"), ("targets", "target_modules")):
            if saved[name] != getattr(self._peft, name):
                raise UserError(
                    f"{directory}: holds adapters of lora.{key}={_shown(saved[name])}, and the run's are of "
                    f"{_shown(getattr(self._peft, name))}: resume with the former"
                )
        check_base(directory, self.base.module)
        adapters = load_file(directory / WEIGHTS)
        for name, weights in self._adapters().items():
            weights.copy_(adapters[_key(name)])

    def _adapters(self) -> dict[str, nn.Parameter]:
        return {name: weights for name, weights in self.module.named_parameters() if ".lora_" in name}

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self.base.module, next(self.base.module.parameters()).dtype)


class SeededDropout(nn.Module):
    """Dropout whose mask is a function of names, so that a layer that is computed again drops the same.

    It is none of torch's: it does not read `training`, which turns on the dropout of the base as well.

    Args:
        rate: share of the numbers that become 0. The others are divided by 1 - rate.
        name: of the layer.
    """

    def __init__(self, rate: float, name: str) -> None:
        super().__init__()
        self.rate = rate
        self.name = name
        self.seed: str | None = None
        """Of the pass; None: nothing is dropped."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.seed is None:
            return inputs
        draw = torch.Generator(inputs.device).manual_seed(seed_of(f"{self.seed}/{self.name}"))
        kept = torch.empty(inputs.shape, dtype=torch.bool, device=inputs.device).bernoulli_(
            1 - self.rate, generator=draw
        )
        return torch.where(kept, inputs / (1 - self.rate), 0)


def merged_weight(layer: Any) -> Tensor:
    """The weight_OI of a layer with its adapter in it, in the type of the layer; without one, its own weight."""
    if not hasattr(layer, "lora_A"):
        return layer.weight.detach()
    with torch.no_grad(), torch.autocast(layer.weight.device.type, enabled=False):
        change_OI = layer.lora_B[_NAME].weight @ layer.lora_A[_NAME].weight
        return torch.add(layer.weight, change_OI, alpha=layer.scaling[_NAME]).to(layer.weight.dtype)


def check_targets(config: Config) -> None:
    """`lora.targets` name layers of the model, whose weights are not read.

    Raises:
        UserError: one is no linear layer.
    """
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(load_model_config(config.model.path, key="model.path"))
    _targets(module, config.lora, config.model.path)


def _targets(module: Any, config: LoraConfig, path: str) -> list[str]:
    """Names of layers that get an adapter, or the ends of their names."""
    linear = [name for name, layer in module.base_model.named_modules() if isinstance(layer, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linear})
    targets = names if config.targets == "all" else config.targets
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown or not targets:
        raise UserError(
            f"lora.targets={_shown(targets)}: the linear layers of {path} are {', '.join(names)}"
            + (f", and not {' or '.join(unknown)}" if unknown else "; name some of them")
        )
    return list(targets)


def _peft_config(base: LanguageModel, config: LoraConfig, path: str) -> Any:
    from peft import LoraConfig as PeftConfig

    targets = _targets(base.module, config, path)
    directory = Path(resolve_model_path(path))
    check_is_whole(path, "model.path", f"lora.rank={config.rank}")
    return PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(directory.resolve()) if directory.is_dir() else path,
    )


@torch.no_grad()
def _initialise(layer: Any, seed: str) -> None:
    """Float32 adapters. A is uniform in ±1/√inputs, as PEFT draws it, from a generator of its own."""
    first, second = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    uniform_RI = torch.rand(first.shape, generator=torch.Generator().manual_seed(seed_of(seed)))
    first.data = ((2 * uniform_RI - 1) / first.shape[1] ** 0.5).to(first.device)
    second.data = torch.zeros(second.shape, device=second.device)
    layer.cast_input_dtype_enabled = False  # autocast narrows A and B; else a float32 copy of every input is kept


def _key(name: str) -> str:
    """PEFT's key of a parameter."""
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"


def _shown(value: Any) -> str:
    return f"[{', '.join(sorted(value))}]" if isinstance(value, set | list | tuple) else f"{value:g}"
