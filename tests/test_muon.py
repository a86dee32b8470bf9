"""support/muon.py against torch.optim.Muon, which orthogonalises one matrix at a time."""

import pytest
import torch

from support.muon import BatchedMuon

SHAPES = [(16, 16), (8, 24), (24, 8), (24, 8), (8, 24), (40, 16)]      # square, wide, tall, equal


def five_steps(optimizer, lr=0.02, dtype=torch.float32, **options):
    """The parameters after each of five steps, and the momentum. Equal shapes have gradients of
    unequal size, so that a norm over a batch of them would show."""
    rng = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=rng).to(dtype)) for s in SHAPES]
    optimizer, history = optimizer(params, lr=lr, momentum=0.9, **options), []
    for _ in range(5):
        for k, p in enumerate(params):
            p.grad = (10.0**-k * torch.randn(p.shape, generator=rng)).to(dtype)
        optimizer.step()
        history.append([p.detach().clone() for p in params])
    return history, [optimizer.state[p]["momentum_buffer"] for p in params]


@pytest.mark.parametrize("weight_decay", [0.0, 5.0])
def test_five_steps_are_those_of_torch(weight_decay):
    """The iteration is in bf16, whose numbers are 2^-8 apart: five rounds of three products may
    move an update by a few percent. A momentum of 0.95 for 0.9 would move it by more than 10%."""
    ours, buffers = five_steps(BatchedMuon, weight_decay=weight_decay)
    theirs, their_buffers = five_steps(torch.optim.Muon, weight_decay=weight_decay)
    decayed = 1 - 0.02 * weight_decay
    for step in range(1, 5):
        for k, shape in enumerate(SHAPES):
            update, expected = (run[step][k] - decayed * run[step - 1][k] for run in (ours, theirs))
            assert (update - expected).norm() < 0.05 * expected.norm(), (step, shape)
    for buffer, expected in zip(buffers, their_buffers, strict=True):
        assert torch.allclose(buffer, expected, rtol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_learning_rate_may_be_a_tensor(weight_decay):
    """Bit for bit on the CPU."""
    number, _ = five_steps(BatchedMuon, weight_decay=weight_decay)
    tensor, _ = five_steps(BatchedMuon, lr=torch.tensor(0.02, dtype=torch.float64),
                           weight_decay=weight_decay)
    assert all(torch.equal(a, b) for a, b in zip(number[-1], tensor[-1], strict=True))


def test_an_update_is_orthogonal_and_a_zero_gradient_harmless():
    p = [torch.nn.Parameter(torch.zeros(16, 48)), torch.nn.Parameter(torch.zeros(16, 48))]
    p[0].grad, p[1].grad = torch.randn(16, 48), torch.zeros(16, 48)
    BatchedMuon(p, lr=1.0, weight_decay=0.0).step()
    values = torch.linalg.svdvals(p[0].detach())
    assert 0.6 < values.min() and values.max() < 1.3            # the iteration aims at about 1
    assert not p[1].any()
