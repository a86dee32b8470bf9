"""`--sampler dpm++`: DPM-Solver++(2M), a method of second order where DDIM is of first.

Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv
2211.01095, algorithm 2; elsewhere called DPM++ 2M. With lambda = ln(alpha / sigma), the exact
solution of the ODE that DDIM integrates, from xs to xt at lambda_t = lambda_s + h, is

    xt = sigma_t / sigma_s xs + sigma_t (integral of exp(lambda) x0_hat d lambda)    prop. 4.1

DDIM takes x0_hat as constant over the step: the integral is then (exp(lambda_t) - exp(lambda_s))
x0_hat. "2M" (second order, multistep) takes it as linear in lambda, along the line through this
step's x0_hat and the previous step's, which costs no further evaluation of the network.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@torch.no_grad()
def dpm_solver_sample(process, predict: Callable, xT: Tensor, noise: Callable | None = None,
                      clip: bool = True, steps: int = 10) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Go back from noise xT (B, C, H, H) to images. Yields (t, x_next, x0_hat) after each step, as
    `GaussianDiffusion.ddim_sample` does. `noise` is not used: xT alone decides the sample.

    The first step has no estimate before it, and in the last one lambda goes to infinity: both are
    DDIM's. The process is any with `alpha_sigma` and `denoise`.
    """
    spaced = torch.linspace(process.num_timesteps - 1, -1, steps + 1, dtype=torch.float64)
    timesteps = spaced[:-1].round().long().tolist()         # -1, behind the last, is the image
    alpha, sigma = (x.flatten().tolist() for x in process.alpha_sigma(torch.tensor(timesteps)))
    level = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]        # lambda
    xt, previous = xT, None
    for i, t in enumerate(timesteps):
        x0_hat, _ = process.denoise(predict, xt, t, clip)
        if i == steps - 1:
            x_next = x0_hat
        else:
            h, mean = level[i + 1] - level[i], x0_hat       # mean: of x0_hat over the step
            if previous is not None:
                mean = x0_hat + (x0_hat - previous) * h / (2 * (level[i] - level[i - 1]))
            x_next = sigma[i + 1] / sigma[i] * xt - alpha[i + 1] * math.expm1(-h) * mean
        yield t, x_next, x0_hat
        xt, previous = x_next, x0_hat
