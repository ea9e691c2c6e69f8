"""What a batch takes of memory: its tokens, and for each of them the bytes in a layer of a model like Llama."""

from __future__ import annotations

from mopd_nemo.engines.architecture import Architecture

WHOLE = 4
"""Bytes of a float32."""


def batch_tokens(budget: float, trees: int, context: int, branches: float, response: int) -> float:
    """Tokens of the largest batch: whole trees of a context and its responses, or one context and some responses."""
    below = response - 1  # the last token is not read
    tree = context + branches * below
    if tree > budget:
        return context + max((budget - context) // below if below else branches, 1) * below
    return min(budget // tree if budget < float("inf") else trees, trees) * tree


def gathered_keys(context: int, response: int, branches: float) -> float:
    """Keys that attention gathers for each token of a tree: a context's again for every response below it."""
    return (context + branches * (context + response)) / (context + branches * response)


def kept_by_layer(model: Architecture, width: int, gathered: float, stored: int, adapted: bool) -> float:
    """Bytes a token that one layer keeps for its backward pass: what its norms, products and attention read.

    Args:
        gathered: keys and values for each token.
        stored: bytes of a hidden state between layers.
        adapted: what only the gradients of frozen weights would read is not kept.
    """
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if adapted:
        hidden, normed = 2 * (WHOLE + width), WHOLE * model.qk_norm
    elif stored < WHOLE:  # for both norms, a float32 copy of the input, its direction and the result
        hidden, normed = 2 * (WHOLE + 2 * width), (WHOLE + width) * model.qk_norm
    else:  # both norms' inputs and results, those also cast, once for every product
        hidden = 4 * stored + (5 * width if width < stored else 2 * stored)
        normed = (WHOLE + width) * model.qk_norm
    attention = queries * (normed + 3 * width) + keys * (normed + 2 * width * gathered)
    return hidden * model.hidden + attention + 4 * width * model.ffn + 3 * WHOLE * model.heads


def passing(model: Architecture, weights: int, width: int, gathered: float) -> float:
    """Bytes a token at the fullest place of a pass that keeps nothing, in attention or in the feed-forward block."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    hidden = 3 * weights * model.hidden
    cast = width if width < weights else 0
    attention = queries * (weights + cast + 3 * width) + keys * (weights + width + 2 * cast + 2 * width * gathered)
    return hidden + max(3 * width * model.ffn, attention)
