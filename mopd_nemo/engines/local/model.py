"""A causal LM split into its body, which gives hidden states of chosen positions, and its head, which gives logits.

Shape suffixes: B sequences, S positions, R chosen positions, T response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging as transformers_logging

from mopd_nemo.config import UserError
from mopd_nemo.engines.base import TokenCounts
from mopd_nemo.engines.local.adapters import read_module
from mopd_nemo.engines.local.prefix_tree import (
    ATTENTION,
    MIN_SHARED,
    PrefixTree,
    build_tree,
    register_attention,
    tree_batches,
)
from mopd_nemo.engines.models import ADAPTER_CONFIG, check_directory, first_line

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LanguageModel:
    """A Hugging Face causal LM with its body and its head apart.

    Args:
        module: the model; its weights may be wider than `dtype`.
        dtype: precision of the computation.
        recompute: keep the input of each layer alone for the backward pass, which computes the rest again.
    """

    def __init__(self, module: Any, dtype: torch.dtype, *, recompute: bool = False) -> None:
        self.module = module.eval()  # no dropout of its own: a live teacher must be the student exactly
        self.dtype = dtype
        self.device: torch.device = next(module.parameters()).device
        self.head: nn.Linear = module.get_output_embeddings()
        self.counts = TokenCounts()
        self._recompute = recompute
        self.flash = _may_flash(self)
        """Whether trees are read by the flash kernel."""
        self.reads_trees = _reads_trees(self)

    def computing(self) -> AbstractContextManager[Any]:
        """The context for forward passes: autocast when weights are wider than `dtype`."""
        plain = all(weights.dtype == self.dtype for weights in self.module.parameters())
        return nullcontext() if plain else torch.autocast(self.device.type, self.dtype)

    def hidden_BSH(self, ids_BS: Tensor) -> Tensor:
        """Last hidden states of right-padded sequences. Causal attention never reads padding on the right."""
        return self.module.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state

    def dropping(self, seed: str) -> AbstractContextManager[None]:
        """The context for forward and backward pass of an update, in which adapters drop some of their inputs.

        Args:
            seed: names the pass.
        """
        return nullcontext()

    def batches(self, units: Sequence[Sequence[Sequence[int]]], max_tokens: int) -> list[list[int]]:
        """Indices of units in micro-batches for `response_hidden_TH`. The sequences of a unit stay together."""
        if self.reads_trees:
            return tree_batches(units, max_tokens)
        return micro_batches([sum(map(len, unit)) for unit in units], max_tokens)

    def response_hidden_TH(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states that predict the response tokens of a batch, laid end to end.

        Response token t of a sequence with P prompt tokens is predicted at position P - 1 + t. Shared prefixes are
        computed once where `reads_trees`.
        """
        hidden_TH = self.hidden_by_tree_TH if self.reads_trees else self.hidden_by_row_TH
        with _computed_again(self.module) if self._recompute and torch.is_grad_enabled() else nullcontext():
            return hidden_TH(prompts, responses)

    def hidden_by_tree_TH(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """`response_hidden_TH` from one packed sequence."""
        sequences, starts = _read(prompts, responses)
        tree = build_tree(sequences, self.device, flash=self.flash)
        self.counts.positions += len(tree.ids_S)
        rows = [place for places, start in zip(tree.places, starts, strict=True) for place in places[start:]]
        rows_T = torch.tensor(rows, device=self.device)
        with _computed_at(_last_feed_forward(self.module), rows_T.unique()):
            return self._tree_hidden_SH(tree).index_select(0, rows_T)

    def hidden_by_row_TH(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """`response_hidden_TH` from a padded batch."""
        sequences, starts = _read(prompts, responses)
        ids_BS = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
        self.counts.positions += ids_BS.numel()
        self.counts.padding += ids_BS.numel() - sum(map(len, sequences))
        hidden_BSH = self.hidden_BSH(ids_BS.to(self.device))
        return torch.cat(
            [hidden_BSH[i, start : len(s)] for i, (s, start) in enumerate(zip(sequences, starts, strict=True))]
        )

    def _tree_hidden_SH(self, tree: PrefixTree) -> Tensor:
        unused = torch.empty(1, 1, 1, 1, device=self.device)  # four dimensions: transformers builds no mask of its own
        return self.module.base_model(
            input_ids=tree.ids_S.unsqueeze(0),
            position_ids=tree.positions_S.unsqueeze(0),
            attention_mask=unused,
            use_cache=False,
            tree=tree,
        ).last_hidden_state[0]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name, tied ones once."""
        return dict(self.module.named_parameters())

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that an optimiser moves, by name."""
        return {name: weights for name, weights in self.module.named_parameters() if weights.requires_grad}

    @contextmanager
    def on_device(self) -> Iterator[nn.Linear]:
        """Inside, the weights are on the device. Gives the head, which may stay there for longer."""
        yield self.head

    def sampled_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that a sampler needs, by the names of the model's files."""
        yield from ((name, weights.detach()) for name, weights in self.module.named_parameters())

    def copy(self, weights: torch.dtype | None = None) -> LanguageModel:
        """A model with the present weights, of which nothing is trained. It shares what is not trained here either.

        Args:
            weights: type of those that are trained here; by default the one that they have.
        """
        shared = {id(weights): weights for weights in self.module.parameters() if not weights.requires_grad}
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module, shared).requires_grad_(False)
        if weights is not None:
            copies = twin.named_parameters()
            for name in self.trained():
                copies[name].data = copies[name].to(weights)
        twin.head = twin.module.get_output_embeddings()
        twin.counts = TokenCounts()
        return twin

    def initial(self) -> LanguageModel:
        """The model as it is before its first update; training does not move it."""
        return self.copy()

    def save(self, directory: Path) -> None:
        """Write what `load` continues from."""
        self.module.save_pretrained(directory)

    def load(self, directory: Path) -> None:
        """Take the weights of a saved model, without changing their type.

        Raises:
            UserError: it is a model of another form.
        """
        if (directory / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{directory}: holds adapters, and lora.rank=0: resume with the lora settings of the run, or start a "
                "new run from it (model.path)"
            )
        saved = type(self.module).from_pretrained(directory, dtype=next(self.module.parameters()).dtype)
        self.module.load_state_dict(saved.state_dict())


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows in batches of at most `max_tokens` padded tokens, longest first.

    Rows of similar length share a batch, so little is padding; the longest batch comes first, so that a batch that
    does not fit in memory shows at once. A row longer than `max_tokens` gets a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _read(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Sequences without their last token, whose output is not needed, and where the predictions of a response begin."""
    sequences = [[*prompt, *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)]
    return sequences, [len(prompt) - 1 for prompt in prompts]


def load_model(
    path: str, *, key: str, dtype: torch.dtype, weights: torch.dtype, device: torch.device, recompute: bool = False
) -> LanguageModel:
    """Load a model directory or hub name. Adapters are merged into the weights of their model.

    Args:
        key: config key that named the path, used in errors.
        dtype: compute precision.
        weights: storage precision.
        recompute: of `LanguageModel`.

    Raises:
        UserError: it cannot be loaded, its layers cannot be computed again, or its logits are not its head applied to
            its hidden states.
    """
    transformers_logging.disable_progress_bar()  # it would break the live display
    check_directory(path, key)
    try:
        module = read_module(path, weights).to(device)
    except UserError:
        raise
    except Exception as error:  # damaged files make libraries raise anything
        raise UserError(f"{key}={path}: cannot load a causal language model: {first_line(error)}") from error
    if recompute and not _layers(module):
        raise UserError(
            f"train.activation_checkpointing=true: {type(module).__name__} of {key}={path} has no list of layers that "
            "could be computed again: set it false"
        )
    model = LanguageModel(module, dtype, recompute=recompute)
    _check_plain_head(model, key, path)
    return model


def resolve_device(name: str) -> torch.device:
    """The device of `auto` or of a name, checked to exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device={name!r}: not a device name; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"model.device={name!r}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"model.device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use model.device=cpu"
        )
    return device


@torch.no_grad()
def _reads_trees(model: LanguageModel) -> bool:
    """Whether `hidden_by_tree_TH` gives what `hidden_by_row_TH` gives, by trying both on short sequences.

    A short trial cannot reveal a limited attention window, so windows are read from the config.
    """
    config = model.module.config.get_text_config()
    windowed = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or [])
    if windowed or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", ATTENTION):
        return False
    register_attention()
    model.module.set_attn_implementation(ATTENTION)
    name = type(model.module).__name__
    if model.flash and not _agrees(model):
        logger.info("%s reads trees without the flash kernel", name)
        model.flash = False
    same = _agrees(model)
    read = f"as trees, {'with' if model.flash else 'without'} the flash kernel" if same else "padded"
    logger.info("%s reads sequences %s", name, read)
    if not same:
        model.module.set_attn_implementation("sdpa")
    return same


def _may_flash(model: LanguageModel) -> bool:
    """Whether the flash kernel has this device and precision. `_reads_trees` tries it."""
    return model.device.type == "cuda" and model.dtype == torch.bfloat16


def _agrees(model: LanguageModel) -> bool:
    """Whether trees and rows give the same on short sequences, of which some share a prefix."""
    vocabulary = model.module.config.get_text_config().vocab_size
    common = [i % vocabulary for i in range(2 * MIN_SHARED)]
    rows = [common] * 3, [[tail] * 3 for tail in range(3)]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    try:
        with model.computing():
            found_TH, plain_TH = model.hidden_by_tree_TH(*rows).float(), model.hidden_by_row_TH(*rows).float()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ImportError, TypeError, ValueError, RuntimeError) as error:
        logger.info("%s cannot read prefix trees: %s", type(model.module).__name__, error)
        return False
    return torch.allclose(found_TH, plain_TH, rtol=0, atol=tolerance * plain_TH.abs().max().item())


@torch.no_grad()
def _check_plain_head(model: LanguageModel, key: str, path: str) -> None:
    """Refuse a model that scales or caps its logits after the head: head(hidden) would be another distribution.

    A student is sampled with a cache of keys and values, which recurrent models do not have.
    """
    ids_BS = torch.arange(4, device=model.device).unsqueeze(0)
    with model.computing():
        output = model.module(input_ids=ids_BS, use_cache=True)
        if key == "model.path" and getattr(output, "past_key_values", None) is None:
            raise UserError(
                f"{key}={path}: {type(model.module).__name__} keeps no cache of keys and values, which the local "
                "engine samples with; choose a transformer"
            )
        logits = output.logits
        plain = model.head(model.hidden_BSH(ids_BS))
    if not torch.allclose(logits.float(), plain.float(), atol=1e-3, rtol=1e-3):
        raise UserError(
            f"{key}={path}: this model transforms its logits after the head (soft-capping or scaling), which the local "
            "engine does not support; choose a model with a plain head, such as Qwen3 or Llama"
        )


def _last_feed_forward(module: Any) -> nn.Module | None:
    """The feed-forward block of a model's last layer, if it has the usual name.

    Nothing attends to its output, so it is computed only at the positions whose hidden states are needed.
    """
    layers = _layers(module)
    return getattr(layers[-1], "mlp", None) if layers else None


def _layers(module: Any) -> Sequence[nn.Module]:
    """The layers of a model, if they have the usual name."""
    layers = getattr(module.base_model, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


@contextmanager
def _computed_again(module: Any) -> Iterator[None]:
    """Inside, layers keep their input alone, and the backward pass computes them a second time.

    All but the last, whose feed-forward block `_computed_at` changes meanwhile. It takes no more memory for that: its
    own part is freed before the layer below it is computed again. No generator's state is kept: what `dropping`
    draws is a function of names.
    """
    layers = _layers(module)[:-1]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _computed_at(block: nn.Module | None, chosen_R: Tensor) -> Iterator[None]:
    """Inside, the block is applied to the positions `chosen_R`, each given once; its output is 0 elsewhere."""
    if block is None:
        yield
        return
    length = 0

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal length
        length = inputs[0].shape[1]
        return (inputs[0].index_select(1, chosen_R), *inputs[1:])

    def spread(_: nn.Module, __: tuple[Tensor, ...], found_1RH: Tensor) -> Tensor:
        return found_1RH.new_zeros(1, length, found_1RH.shape[-1]).index_copy_(1, chosen_R, found_1RH)

    hooks = block.register_forward_pre_hook(select), block.register_forward_hook(spread)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
