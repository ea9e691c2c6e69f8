"""Advantages, clipping, importance weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.losses.reference import clipped_policy_gradient, importance_weights
from mopd_nemo.methods.grpo import group_advantages

REWARDS = st.lists(st.sampled_from([0.0, 0.25, 1.0, -1.0]), min_size=2, max_size=8)


@given(REWARDS, st.booleans())
def test_advantages_are_centred(rewards: list[float], normalise: bool) -> None:
    advantages = group_advantages(rewards, normalise)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-9)
    if len(set(rewards)) == 1:
        assert advantages == [0.0] * len(rewards)
    elif normalise:
        assert torch.tensor(advantages).std().item() == pytest.approx(1.0)
    else:
        assert max(advantages) - min(advantages) == pytest.approx(max(rewards) - min(rewards))


def test_a_rollout_alone_has_no_advantage() -> None:
    assert group_advantages([1.0], True) == [0.0]
    assert group_advantages([], False) == []


def test_clipping_is_asymmetric_and_one_sided() -> None:
    old = torch.zeros(4)
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss_T = clipped_policy_gradient(logprobs, old, advantages, 0.2, 0.28)
    torch.testing.assert_close(loss_T, torch.tensor([-1.28, 1.5, -0.5, 0.8]))
    loss_T.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]))


def test_without_old_logprobs_it_is_the_plain_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss_T = clipped_policy_gradient(logprobs, None, torch.tensor([0.5, -2.0]), 0.2, 0.28)
    loss_T.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.5, 2.0]))


def test_importance_weights_are_truncated_finite_and_constant() -> None:
    trainer = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -1.5, -9.0, 1e4])
    weights = importance_weights(trainer, sampler)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.6487213, 2.0, 0.0]), atol=1e-6, rtol=1e-6)
    assert not weights.requires_grad
