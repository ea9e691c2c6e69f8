"""AdamW of the local engine: torch's own in float32, or one whose weights and moments take less memory.

    optimizer.weights     float32: 4 bytes a parameter; bfloat16: 2, and no float32 copy of them
    optimizer.moments     float32: 8 bytes a parameter; int8: 2

Gradients are float32 in all cases, and so is the arithmetic of an update. Its result is rounded to bfloat16 up or down
at random, so that its mean is the float32 result. A bfloat16 number has 8 significant bits: rounding to the nearest
would lose every update below half a step of the weight, and most are. The draws have named seeds, so a run that was
killed continues bit for bit.

8-bit moments are those of Dettmers et al. (2021, https://arxiv.org/abs/2110.02861), also of torchao and bitsandbytes:
each number is one of 256 levels, times a scale that 256 numbers share.

Shape suffixes: N numbers of a slice, B blocks, S numbers of a block, L levels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.config import Config, OptimizerConfig, UserError
from mopd_nemo.engines.base import seed_of
from mopd_nemo.engines.local.memory import BLOCK, SLICE, is_quantised, is_small
from mopd_nemo.engines.local.model import LanguageModel

EPSILON = 1e-8
TINY = torch.finfo(torch.float32).tiny
"""The smallest scale: a large model's gradients of 1e-7 have squares of 1e-14."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_optimizer(config: Config) -> None:
    """This torch can do what `optimizer.weights` asks for.

    Raises:
        UserError: it cannot.
    """
    if config.optimizer.weights == "bfloat16" and not hasattr(Tensor, "grad_dtype"):
        raise UserError(
            f"optimizer.weights=bfloat16 needs torch 2.10 or newer, for float32 gradients, and this is "
            f"{torch.__version__}: upgrade it, or set optimizer.weights=float32"
        )


def make_optimizer(student: LanguageModel, config: Config) -> torch.optim.Optimizer:
    """AdamW over what is trained. Weight decay is for matrices only."""
    optimizer, trained = config.optimizer, student.trained()
    matrices = {name: weights for name, weights in trained.items() if weights.dim() >= 2}
    vectors = {name: weights for name, weights in trained.items() if weights.dim() < 2}
    decays = ((matrices, optimizer.weight_decay), (vectors, 0.0))
    if not is_small(config):
        return torch.optim.AdamW(
            [{"params": list(some.values()), "weight_decay": decay} for some, decay in decays],
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=EPSILON,
            fused=True if student.device.type == "cuda" else None,
        )
    for weights in trained.values():
        weights.grad_dtype = torch.float32  # autograd would add the micro-batches up in the type of the weights
    groups = [{"params": list(some.items()), "weight_decay": decay} for some, decay in decays]
    return SmallAdamW(groups, optimizer, str(config.seed))


class SmallAdamW(torch.optim.Optimizer):
    """AdamW with `optimizer.weights` and `optimizer.moments`. It expects float32 gradients.

    Args:
        groups: of named parameters, with their `weight_decay`.
        seed: of the rounding.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, seed: str) -> None:
        super().__init__(groups, {"lr": config.learning_rate, "betas": config.betas})
        self._seed = seed
        self._types = {"weights": config.weights, "moments": config.moments}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for name, weights in zip(group["param_names"], group["params"], strict=True):
                if weights.grad is None:
                    continue
                state = self.state[weights] or self._begin(weights)
                state["step"] += 1
                generator = torch.Generator(weights.device)
                generator.manual_seed(seed_of(f"{self._seed}/rounding/{state['step']}/{name}"))
                size = SLICE[weights.device.type]
                for start in range(0, weights.numel(), size):
                    part = slice(start, min(start + size, weights.numel()))
                    _move(weights, state, part, group, generator)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self._types

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, which would cast moments to the type of the weights."""
        parameters = [weights for group in self.param_groups for weights in group["params"]]
        for number, state in state_dict["state"].items():
            self.state[parameters[number]] = state

    def _begin(self, weights: Tensor) -> dict[str, Any]:
        """The state before the first update."""
        state = self.state[weights]
        state["step"] = 0
        small = self._types["moments"] == "int8" and is_quantised(weights.numel())
        for name in MOMENTS:
            state[name] = torch.zeros_like(weights, dtype=torch.uint8 if small else torch.float32)
            if small:
                state[f"{name}_scale"] = torch.zeros(weights.numel() // BLOCK, device=weights.device)
        return state


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], config: OptimizerConfig) -> None:
    """Continue from what `state_dict` gave.

    Raises:
        UserError: it is of other types.
    """
    for key in ("weights", "moments"):
        held, wanted = saved.get(key, "float32"), getattr(config, key)
        if held != wanted:
            raise UserError(
                f"optimizer.{key}={wanted}: the checkpoint was saved with {held}: resume with optimizer.{key}={held}"
            )
    optimizer.load_state_dict(saved)


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 numbers in bfloat16: each the one below or above it, by its distance to both; the mean is the number.

    The bits that bfloat16 lacks are a fraction of its step. A random one is added before they are cut off.
    """
    noise = torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    return noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def _move(
    weights: Tensor, state: dict[str, Any], part: slice, group: dict[str, Any], generator: torch.Generator
) -> None:
    """The update of some numbers of a parameter."""
    (beta, beta_sq), rate, step = group["betas"], group["lr"], state["step"]
    held_N, grad_N = weights.view(-1)[part], weights.grad.reshape(-1)[part]  # type: ignore[union-attr]
    mean_N = _read(state, "exp_avg", part).lerp(grad_N, 1 - beta)
    square_N = _read(state, "exp_avg_sq", part).lerp(grad_N.square(), 1 - beta_sq)
    _write(state, "exp_avg", part, mean_N)
    _write(state, "exp_avg_sq", part, square_N)
    scale_N = square_N.sqrt_().div_((1 - beta_sq**step) ** 0.5).add_(EPSILON)
    moved_N = held_N.float() * (1 - rate * group["weight_decay"])
    moved_N.addcdiv_(mean_N, scale_N, value=-rate / (1 - beta**step))
    held_N.copy_(moved_N if held_N.dtype == torch.float32 else stochastically_rounded(moved_N, generator))


def _read(state: dict[str, Any], name: str, part: slice) -> Tensor:
    """Some numbers of a moment, in float32. The part begins and ends with a block."""
    held_N = state[name].view(-1)[part]
    if f"{name}_scale" not in state:
        return held_N
    scale_B = state[f"{name}_scale"][part.start // BLOCK : part.stop // BLOCK]
    values_N = levels(name, held_N.device).index_select(0, held_N.int())
    return values_N.view(-1, BLOCK).mul_(scale_B.unsqueeze(1)).flatten()


def _write(state: dict[str, Any], name: str, part: slice, values_N: Tensor) -> None:
    """Replace what `_read` gives."""
    held_N = state[name].view(-1)[part]
    if f"{name}_scale" not in state:
        held_N.copy_(values_N)
        return
    scale_B = values_N.view(-1, BLOCK).abs().amax(1).clamp_(min=TINY)
    state[f"{name}_scale"][part.start // BLOCK : part.stop // BLOCK] = scale_B
    codes_N = nearest_codes(name, (values_N.view(-1, BLOCK) / scale_B.unsqueeze(1)).flatten())
    if name == "exp_avg_sq":
        # A square that is 0 by rounding, under a mean that is not, would throw its weight far off at the next update.
        codes_N.clamp_(min=1)
    held_N.copy_(codes_N)


def nearest_codes(name: str, values_N: Tensor) -> Tensor:
    """The code of the level next to each number, the upper one from the middle on.

    A search of `_between`, 8 times as fast on a CPU: the upper 16 bits of a number leave two codes that differ by 1.
    """
    lower_W, between_L = _lower_codes(name, values_N.device), _between(name, values_N.device)
    codes_N = lower_W.index_select(0, (values_N.view(torch.int32) >> 16).bitwise_and_(2**16 - 1))
    return codes_N.add_(values_N >= between_L.index_select(0, codes_N.int()))


@cache
def _lower_codes(name: str, device: torch.device) -> Tensor:
    """For each value of the upper 16 bits, the code of the least number that has them."""
    bits_W = torch.arange(2**16, dtype=torch.int32, device=device)
    bits_W = (bits_W << 16) + (bits_W >= 2**15).int() * (2**16 - 1)  # of negative numbers the one farthest from 0
    return torch.bucketize(bits_W.view(torch.float32), _between(name, device)[:-1], right=True).to(torch.uint8)


@cache
def _between(name: str, device: torch.device) -> Tensor:
    """The middle between each level and the next one; after the last there is none."""
    levels_L = levels(name, device)
    return torch.cat([(levels_L[1:] + levels_L[:-1]) / 2, levels_L.new_tensor([torch.inf])])


@cache
def levels(name: str, device: torch.device) -> Tensor:
    """The numbers from -1 to 1, or of squares from 0 to 1, that codes stand for, in order.

    0 and 1, and for each power of ten from 10^-6 to 1 the middles of equal parts of [0.1, 1], twice as many as for the
    power before.
    """
    signed = name == "exp_avg"
    found = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (power + (not signed)) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)
        found += [middles, -middles] if signed else [middles]
    return torch.cat(found).sort().values.to(device)
