"""`--process learned-variance`: the network predicts the variance of each reverse step.

Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672, and what
the DiT paper trains with. A second set of output channels, v, chooses the variance of each step
between its two bounds, the posterior's (v = -1) and beta (v = +1). The squared error teaches v
nothing, so the loss adds the step's term of the variational bound, in which the mean is detached:

    variance = exp(share ln beta + (1 - share) ln posterior), share = (v + 1) / 2      eq. 15
    L_hybrid = L_simple + 0.001 L_vlb                                                  eq. 16

That bound is a likelihood, `bits_per_dimension`; and with the variances it has learned, the DDPM
sampler needs fewer steps. The paper's objective: --prediction eps --timesteps uniform.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffusion import GaussianDiffusion


def posterior(bar, bar_next) -> tuple:
    """Of a step back from alpha_bar = bar to bar_next, tensors or numbers: the shares of x0 and of
    xt in the mean of q(x_next | xt, x0), its variance, and beta. DDPM eq. 6, 7."""
    beta = 1 - bar / bar_next
    rest = (1 - bar_next) / (1 - bar)
    return bar_next**0.5 * beta / (1 - bar), (1 - beta) ** 0.5 * rest, beta * rest, beta


def interpolate(v: Tensor, log_posterior: Tensor | float, log_beta: Tensor | float) -> Tensor:
    """The logarithm of the variance that v stands for. Eq. 15."""
    share = (v + 1) / 2
    return share * log_beta + (1 - share) * log_posterior


def decoder_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-ln of the probability that a normal number falls into the bin of x0, one of 256 grey levels;
    the outermost bins are open. DDPM eq. 13; the normal distribution function as in tanh-GELU."""
    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    scale = torch.exp(-log_variance / 2)
    upper = torch.where(x0 > 0.999, 1.0, cdf((x0 + 1 / 255 - mean) * scale))
    lower = torch.where(x0 < -0.999, 0.0, cdf((x0 - 1 / 255 - mean) * scale))
    return -(upper - lower).clamp(min=1e-12).log()


class LearnedVariance(GaussianDiffusion):
    """GaussianDiffusion with variances from a network that has twice as many output channels."""

    network_arguments = dict(learn_sigma=True)

    def __init__(self, **arguments):
        super().__init__(**arguments)
        before = torch.cat([torch.ones(1).double(), self.alpha_bar[:-1]])
        x0_share, xt_share, variance, beta = posterior(self.alpha_bar, before)
        variance[0] = variance[1:2].sum()       # it is 0, which has no logarithm
        self.table = torch.stack([x0_share, xt_share, variance.log(), beta.log()]).float()

    def to(self, device) -> "LearnedVariance":
        self.table = self.table.to(device)
        return super().to(device)

    def loss(self, model, x0: Tensor, t: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """L_hybrid of each image, (B,)."""
        xt = self.q_sample(x0, t, eps)
        out, v = model(xt, t, y).chunk(2, dim=1)
        simple = super().loss(lambda *_: out, x0, t, y, eps)
        # one term of L_vlb's num_timesteps
        return simple + 0.001 * self.num_timesteps * self.bound_term(out.detach(), v, x0, xt, t)

    def bound_term(self, out: Tensor, v: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Term t of the variational bound, in bits per dimension, (B,): KL(q || p) for the step
        back from t, and -ln p(x0 | xt) for t = 0. DDPM eq. 5."""
        x0_share, xt_share, log_posterior, log_beta = self.table[:, t].view(4, -1, 1, 1, 1)
        x0_hat, _ = self.x0_and_eps(out, xt, t)
        log_variance = interpolate(v, log_posterior, log_beta)
        error = x0_share * (x0 - x0_hat)                            # of p's mean against q's
        kl = 0.5 * (log_variance - log_posterior - 1 + (log_posterior - log_variance).exp()
                    + error.square() * (-log_variance).exp())
        nll = decoder_nll(x0, x0_share * x0_hat + xt_share * xt, log_variance)
        nats = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl)
        return nats.mean(dim=(1, 2, 3)) / math.log(2)

    @torch.no_grad()
    def bits_per_dimension(self, model, x0: Tensor, y: Tensor) -> Tensor:
        """The variational bound on -log2 p(x0), per pixel and channel: (B,). x0 (B, C, H, H) has
        256 grey levels in [-1, 1]. It costs one evaluation of the network per timestep."""
        bar = self.alpha_bar[-1].item()
        prior = 0.5 * (bar * x0.square() - bar - math.log(1 - bar))  # KL(q(xT | x0) || N(0, 1))
        total = prior.mean(dim=(1, 2, 3)) / math.log(2)
        for i in range(self.num_timesteps):
            t = torch.full_like(y, i)
            xt = self.q_sample(x0, t, torch.randn_like(x0))
            total += self.bound_term(*model(xt, t, y).chunk(2, dim=1), x0, xt, t)
        return total

    # ------------------------------------------------------------ back

    def denoise(self, predict: Callable, xt: Tensor, t: int, clip: bool = True
                ) -> tuple[Tensor, Tensor]:
        """(x0_hat, eps_hat), without v: all that DDIM and DPM-Solver++ need."""
        return super().denoise(lambda xt, t: predict(xt, t)[:, : xt.shape[1]], xt, t, clip)

    def guided(self, guidance: Callable) -> Callable:
        """`guidance`, a function (model, y, cfg_scale) -> predict(xt, t), for all but v, which
        stays the model's own: a variance is no direction to exaggerate. That is v of the class,
        or of "no class" at cfg_scale 0: the first rows of the batch that the model was given."""
        def guide(model, y: Tensor, cfg_scale: float) -> Callable[[Tensor, int], Tensor]:
            def recorded(xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
                out = model(xt, t, labels)
                recorded.v = out[: len(y), xt.shape[1]:]
                return out

            recorded.null_class = model.null_class
            predict = guidance(recorded, y, cfg_scale)
            return lambda xt, t: torch.cat(
                [predict(xt, t)[:, : xt.shape[1]], recorded.v], dim=1)

        return guide

    @torch.no_grad()
    def ddpm_sample(self, predict: Callable, xT: Tensor, noise: Callable | None = None,
                    clip: bool = True, steps: int = 250) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`GaussianDiffusion.ddpm_sample` with the learned variances, over `steps` of the
        timesteps. Raises ValueError unless 1 <= steps <= num_timesteps."""
        noise = noise or (lambda t: torch.randn_like(xT))
        xt, timesteps = xT, self.ddim_timesteps(steps)
        for t, t_next in zip(timesteps, timesteps[1:] + [-1], strict=True):
            out, v = predict(xt, t).chunk(2, dim=1)
            x0_hat, _ = super().denoise(lambda *_, out=out: out, xt, t, clip)
            x0_share, xt_share, variance, beta = posterior(
                self.alpha_bar_at(t), self.alpha_bar_at(t_next))
            x_next = x0_share * x0_hat + xt_share * xt
            if t_next >= 0:
                log_variance = interpolate(v, math.log(variance), math.log(beta))
                x_next = x_next + (log_variance / 2).exp() * noise(t)
            yield t, x_next, x0_hat
            xt = x_next
