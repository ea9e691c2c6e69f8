"""A model whose weights are in host memory, and on the device only while it reads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mopd_nemo.engines.base import TokenCounts
from mopd_nemo.engines.local.model import LanguageModel


class OffloadedModel(LanguageModel):
    """Weights that are not trained, in host memory: pinned where the device is a GPU.

    `on_device` copies them to the device, one by one. The weights of linear layers get the type there that the
    computation reads them in. Autocast would give it to them at each use, so results are the same to the bit. All
    others (embeddings, norms) keep theirs.

    Args:
        model: its present weights are copied. Its device, and how it reads sequences, hold here too.
        weights: storage precision; None: each weight has the one that it has in `model`.
    """

    def __init__(self, model: LanguageModel, weights: torch.dtype | None = None) -> None:
        vars(self).update(vars(model))
        self.counts = TokenCounts()
        parameters = model.named_parameters()
        places = {id(p): nn.Parameter(p.new_empty(0, dtype=weights), requires_grad=False) for p in parameters.values()}
        self.module = copy.deepcopy(model.module, places)
        self.head = self.module.get_output_embeddings()
        self._host = {
            name: nn.Parameter(on_host(p, weights or p.dtype), requires_grad=False) for name, p in parameters.items()
        }
        self._narrowed = _of_linear_layers_alone(self.module)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those in host memory."""
        return self._host

    @contextmanager
    def on_device(self) -> Iterator[nn.Linear]:
        with self._holding((name, self._copied(name)) for name in self._host):
            yield self._present_head()

    def save(self, directory: Path) -> None:
        with self._holding(self._host.items()):
            super().save(directory)

    def load(self, directory: Path) -> None:
        with self._holding(self._host.items()):
            super().load(directory)

    def _copied(self, name: str) -> Tensor:
        """A weight on the device, as it is computed with. A GPU is faster at narrowing than a CPU."""
        copied = self._host[name].detach().to(self.device, copy=True)
        return copied.to(self.dtype) if name in self._narrowed else copied

    def _present_head(self) -> nn.Linear:
        """The head as it is now, as it is computed with. It shares memory with the weights where it can."""
        head = nn.Linear(self.head.in_features, self.head.out_features, self.head.bias is not None, device="meta")
        for name, weights in self.head.named_parameters():
            setattr(head, name, nn.Parameter(weights.detach().to(self.dtype), requires_grad=False))
        return head

    @contextmanager
    def _holding(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Inside, the module has these weights; before and after it has none."""
        places = dict(self.module.named_parameters())
        try:
            for name, held in weights:
                places[name].data = held.detach()
            yield
        finally:
            for place in places.values():
                place.data = place.new_empty(0)


def on_host(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in host memory, pinned if it comes from a GPU."""
    return torch.empty(weights.shape, dtype=dtype, pin_memory=weights.is_cuda).copy_(weights.detach())


def _of_linear_layers_alone(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that no other kind of layer reads, as the embedding does with a tied head."""
    kinds: dict[int, set[bool]] = {}
    for layer in module.modules():
        for weights in layer.parameters(recurse=False):
            kinds.setdefault(id(weights), set()).add(type(layer) is nn.Linear)
    return frozenset(name for name, weights in module.named_parameters() if kinds[id(weights)] == {True})
