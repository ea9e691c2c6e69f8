"""What the sampler is held against is what the sampler multiplies."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.generation import Products, ours, random_weights

aten = torch.ops.aten
Shape = tuple[int, ...]


class Recorded(TorchDispatchMode):
    """Counts matrix products by the shapes of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Shape, Shape]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.bmm.default, aten.matmul.default):
            self._count(*(x.flatten(0, -3).shape if x.dim() > 2 else x.shape for x in args))
        elif func is aten.linear.default:
            self._count(args[0].shape, args[1].mT.shape)
        elif func is aten.baddbmm.default:
            self._count(args[1].shape, args[2].shape)
        elif "scaled_dot_product" in func.name():
            count, heads, width, size = args[0].shape
            self._count((count * heads, width, size), (count * heads, size, width))
            self._count((count * heads, width, width), (count * heads, width, size))
        return func(*args, **(kwargs or {}))

    def _count(self, a: Shape, b: Shape) -> None:
        self.found[tuple(a), tuple(b)] += 1


def test_products_are_those_of_the_sampler() -> None:
    case = random_weights(
        "Qwen3", 3, 40, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, num_key_value_heads=2
    )
    lengths = ours(case, "s")
    assert len(set(lengths)) > 5, "sequences should end at different times"
    products = Products(case, lengths)
    with Recorded() as by_sampler:
        ours(case, "s")
    with Recorded() as by_products:
        products()
    assert by_sampler.found == by_products.found
    assert sum(by_sampler.found.values()) > 2 * 6 * (max(lengths) - 1)
