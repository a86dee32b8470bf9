"""torch.optim.Muon with the Newton-Schulz iteration of equally large matrices in one batch."""

import math
from collections import defaultdict

import torch
from torch import Tensor


class BatchedMuon(torch.optim.Muon):
    """The update of torch.optim.Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/),
    to rounding, in a third of the operations: a small network's step is bound by their number.
    The state is torch's, `momentum_buffer`, so checkpoints fit both."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params, grads, buffers = [], [], []
            self._init_group(group, params, grads, buffers)
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            updates = torch._foreach_lerp(grads, buffers, momentum)         # Nesterov
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            batches = defaultdict(list)         # wide matrices of one shape, tall ones transposed
            for p, update in zip(params, updates, strict=True):
                wide = update if p.shape[0] <= p.shape[1] else update.mT
                batches[wide.shape].append((p, wide))
            for batch in batches.values():
                stacked = orthogonalize(torch.stack([wide for _, wide in batch]),
                                        group["ns_coefficients"], group["ns_steps"], group["eps"])
                for (p, _), update in zip(batch, stacked.to(params[0].dtype), strict=True):
                    rows, columns = p.shape
                    p.add_(update if rows <= columns else update.mT,
                           alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
                  ) -> Tensor:
    """Newton-Schulz iteration in bf16: the nearest (semi-)orthogonal matrix, roughly, to each of
    x (n, rows, columns), rows <= columns."""
    a, b, c = coefficients
    x = x.bfloat16()
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]          # spectral norm <= 1
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x
