"""The sizes of a model: from its config, or from a name that is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mopd_nemo.embedded import resolve_model_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder of the Llama family: grouped-query attention, gated MLP or experts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the MLP, or of one expert."""
    vocab: int
    tied: bool = False
    """Whether the output layer is the embedding."""
    experts: int = 0
    """0: a dense MLP."""
    qk_norm: bool = True

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp(self) -> int:
        """Parameters of one layer's MLP, without its experts."""
        return self.hidden * self.experts if self.experts else 3 * self.hidden * self.ffn

    @property
    def all_experts(self) -> int:
        """Parameters of one layer's experts."""
        return 3 * self.hidden * self.ffn * self.experts

    @property
    def norms(self) -> int:
        """Parameters of one layer's norms."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        layer = self.attention + self.mlp + self.all_experts + self.norms
        return self.layers * layer + self.hidden + self.embedding * (1 if self.tied else 2)

    def adapters(self, rank: int, targets: Literal["all"] | tuple[str, ...] = "all") -> int:
        """Parameters of LoRA adapters of a dense model, at layers by their names in transformers."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        both = {
            **dict.fromkeys(("q_proj", "o_proj"), self.hidden + queries),
            **dict.fromkeys(("k_proj", "v_proj"), self.hidden + keys),
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.hidden + self.ffn),
        }  # inputs and outputs
        return rank * self.layers * sum(size for name, size in both.items() if _is_chosen(name, targets))

    def adapter_inputs(self, targets: Literal["all"] | tuple[str, ...] = "all") -> tuple[int, int]:
        """Numbers a token that the adapters of one layer read; and these when what several read is counted once."""
        queries = self.heads * self.head_dim
        readers = (
            (("q_proj", "k_proj", "v_proj"), self.hidden),
            (("o_proj",), queries),
            (("gate_proj", "up_proj"), self.hidden),
            (("down_proj",), self.ffn),
        )
        read = [(sum(_is_chosen(name, targets) for name in names), size) for names, size in readers]
        return sum(count * size for count, size in read), sum(size for count, size in read if count)


def _is_chosen(name: str, targets: Literal["all"] | tuple[str, ...]) -> bool:
    """Whether a layer gets an adapter. A name of one layer's stands for all that are called so: rather too much."""
    return targets == "all" or name in {target.rpartition(".")[2] for target in targets}


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool = False) -> Architecture:
    return Architecture(
        layers=layers, hidden=hidden, heads=heads, kv_heads=8, head_dim=128, ffn=ffn, vocab=151936, tied=tied
    )


KNOWN = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 32, 12288),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 40, 17408),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 64, 25600),
    "Qwen/Qwen3-30B-A3B": Architecture(
        layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, ffn=768, vocab=151936, experts=128
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Architecture(
        layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, qk_norm=False
    ),
    "meta-llama/Llama-3.3-70B-Instruct": Architecture(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=128256, qk_norm=False
    ),
}
"""Sizes of models that may not be installed where a job is submitted."""


def architecture_of(path: str, hf_home: str | None = None) -> Architecture | None:
    """Sizes of an embedded model, a model directory, a model in a Hugging Face cache, or a known name. None: unknown.

    Raises:
        UserError: there is no such embedded model.
    """
    path = resolve_model_path(path)
    directory = find_model(path, hf_home)
    if directory is not None:
        return from_config(json.loads((directory / "config.json").read_text()))
    return KNOWN.get(path)


def find_model(path: str, hf_home: str | None) -> Path | None:
    """The directory with the model's `config.json`. None: it is not on this machine."""
    if (Path(path) / "config.json").is_file():
        return Path(path)
    if hf_home is None:
        return None
    snapshots = Path(hf_home) / "hub" / f"models--{path.replace('/', '--')}" / "snapshots"
    return next((found.parent for found in sorted(snapshots.glob("*/config.json"))), None)


def from_config(config: Mapping[str, Any]) -> Architecture | None:
    """Sizes from a Hugging Face config. None: another family of models."""
    try:
        heads = config["num_attention_heads"]
        return Architecture(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config.get("moe_intermediate_size") or config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            experts=config.get("num_experts") or config.get("num_local_experts") or 0,
            qk_norm=config.get("model_type", "").startswith("qwen3"),
        )
    except KeyError:
        return None
