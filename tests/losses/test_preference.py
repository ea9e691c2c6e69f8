"""DPO and SimPO on summed log-probabilities."""

import math

import pytest
import torch

from mopd_nemo.losses.reference import dpo_loss, simpo_loss


def test_dpo_by_hand() -> None:
    chosen, rejected = torch.tensor([-10.0, -5.0]), torch.tensor([-12.0, -4.0])
    reference = torch.tensor([-11.0, -5.0]), torch.tensor([-11.0, -4.0])
    loss_N = dpo_loss(chosen, rejected, *reference, beta=0.1)
    assert loss_N[0].item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.2))))
    assert loss_N[1].item() == pytest.approx(math.log(2))  # the policy is still the reference


def test_simpo_by_hand_and_blind_to_length() -> None:
    arguments = torch.tensor([-10.0]), torch.tensor([-30.0])
    loss = simpo_loss(*arguments, torch.tensor([10.0]), torch.tensor([15.0]), beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-(2.0 * (-1.0 + 2.0) - 1.0)))))
    doubled = simpo_loss(*(2 * x for x in arguments), torch.tensor([20.0]), torch.tensor([30.0]), beta=2.0, gamma=1.0)
    torch.testing.assert_close(doubled, loss)


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_gradient_raises_the_chosen_and_lowers_the_rejected(loss: str) -> None:
    chosen, rejected = torch.tensor([-7.0], requires_grad=True), torch.tensor([-6.0], requires_grad=True)
    if loss == "dpo":
        dpo_loss(chosen, rejected, torch.tensor([-7.0]), torch.tensor([-7.0])).sum().backward()
    else:
        simpo_loss(chosen, rejected, torch.tensor([3.0]), torch.tensor([3.0])).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() < 0 < rejected.grad.item()
