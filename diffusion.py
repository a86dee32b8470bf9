"""The process: how noise is added, what the network learns, and how sampling removes the noise.

Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models" (DDPM), arXiv 2006.11239.

    forward    xt = alpha x0 + sigma eps                             DDPM eq. 4    q_sample
    learn      weight(t) || target - model(xt, t, y) ||^2            DDPM eq. 14   loss
    denoise    x0_hat = (xt - sigma eps_hat) / alpha, if the         DDPM eq. 15   x0_and_eps
               output is eps_hat; its form for v and x0 otherwise
    step back  x_s = alpha_s x0_hat + sigma_s eps_hat, any s < t     DDIM eq. 12   ddim_sample
               or q(x_{t-1} | xt, x0) = N(mean, variance)            DDPM eq. 6-7  q_posterior
    guide      uncond + cfg_scale (cond - uncond)           2207.12598  classifier_free_guidance

x0 is a clean image in [-1, 1], eps standard normal noise, xt the mixture of both; `_hat` marks the
network's estimates. weight(t) is 1 in DDPM. beta_t is the variance of the noise added at step t;
alpha_bar_t, the product of (1 - beta) over all steps up to t, is the share of the image's variance
that is left. Two abbreviations, after Salimans & Ho: alpha = sqrt(alpha_bar) and sigma = sqrt(1 -
alpha_bar), so alpha^2 + sigma^2 = 1. (DDPM's own alpha_t is 1 - beta_t; it does not occur here.)

Timesteps are t = 0..999, the paper's 1..1000 less one. So xt at t = 0 is the least noisy image, not
x0; the step from t = 0 leads to x0 and adds no noise. `python diffusion.py` checks q_sample,
target, x0_and_eps, loss and DDIM.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PREDICTIONS = ("eps", "v", "x0")        # what the output of the network may mean
WEIGHTINGS = ("plain", "v", "min-snr")  # and how the errors at different t are weighted


class GaussianDiffusion:
    """The DDPM process with a linear beta schedule, for one prediction type.

    num_timesteps, beta_start, beta_end: the schedule (DDPM section 4: 1000, 1e-4, 0.02).
    prediction, weighting: one of PREDICTIONS and of WEIGHTINGS (the paper: "eps", "plain";
    train_mnist.py: "x0", "v"). Raises ValueError for others, and for betas that fall or leave
    (0, 1). `alpha_bar` (T,) is float64 on the CPU; `to(device)` moves its float32 tables.
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
                 prediction: str = "x0", weighting: str = "plain"):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r} is none of {', '.join(PREDICTIONS)}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting {weighting!r} is none of {', '.join(WEIGHTINGS)}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta {beta_start} to {beta_end}: must not fall or leave (0, 1)")
        self.num_timesteps, self.prediction, self.weighting = num_timesteps, prediction, weighting
        beta = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        self.alpha_bar = torch.cumprod(1 - beta, dim=0)
        self.alpha, self.sigma = self.alpha_bar.sqrt().float(), (1 - self.alpha_bar).sqrt().float()
        noise_level = (self.sigma / self.alpha).log()
        self.noise_level_bounds = (noise_level[1:] + noise_level[:-1]) / 2      # between timesteps

    def to(self, device) -> "GaussianDiffusion":
        """Move the float32 tables to `device`, in place. Returns self."""
        for name in ("alpha", "sigma", "noise_level_bounds"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def alpha_sigma(self, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """The two coefficients of xt, float32 (B, 1, 1, 1) for t (B,); (1, 1, 1, 1) for an int."""
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    # ------------------------------------------------------------ forward, and what is learned

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise x0 (B, C, H, H) to timesteps t (B,) in one jump, with the noise eps. DDPM eq. 4."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the output should be: eps, x0 or v = alpha eps - sigma x0. For a known xt each gives
        the others, but an error of a given size differs in each (README, "What to predict")."""
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "eps":
            return eps                                      # DDPM, DiT
        if self.prediction == "v":
            return alpha * eps - sigma * x0                 # Salimans & Ho, arXiv 2202.00512
        return x0

    def x0_and_eps(self, out: Tensor, xt: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """(x0_hat, eps_hat) implied by the output and xt = alpha x0 + sigma eps. DDPM eq. 15."""
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "eps":
            return (xt - sigma * out) / alpha, out
        if self.prediction == "v":                          # since alpha^2 + sigma^2 = 1
            return alpha * xt - sigma * out, sigma * xt + alpha * out
        return out, (xt - alpha * out) / sigma

    def loss(self, model, x0: Tensor, t: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """Squared error of model(xt, t, y) against `target`, the mean of each image, times
        `loss_weight`: (B,). DDPM eq. 14 ("simple" loss) where the output is eps and the weighting
        plain. All shapes as in `q_sample`; y (B,).
        """
        out = model(self.q_sample(x0, t, eps), t, y)
        error = (out - self.target(x0, eps, t)).square().mean(dim=(1, 2, 3))
        return error * self.loss_weight(t)

    def loss_weight(self, t: Tensor) -> Tensor:
        """The factor (B,) of the squared error of the output at timesteps t (B,)."""
        alpha, sigma = self.alpha[t], self.sigma[t]
        if self.weighting == "plain":
            return torch.ones_like(alpha)
        # By `x0_and_eps`, an error of 1 in the output is an error of this size in x0_hat:
        x0_error = {"eps": sigma / alpha, "v": sigma, "x0": torch.ones_like(sigma)}[self.prediction]
        if self.weighting == "v":
            # Measure it in v: v_hat - v = -(x0_hat - x0) / sigma. Without the floor of 0.05 (JiT,
            # 2511.13720) the weight of x0's error at t = 0, 1 / sigma^2, would be 10,000.
            return (x0_error / sigma.clamp(min=0.05)).square()
        # Min-SNR-5 (2303.09556): x0's error times the signal-to-noise ratio, at most 5
        return x0_error.square() * (alpha / sigma).square().clamp(max=5)

    # ------------------------------------------------------------ the timesteps of training

    def t_from_uniform(self, u: Tensor) -> Tensor:
        """Timesteps (B,) at the fractions u (B,) in [0, 1) of the way from 0 to the last."""
        return (u * self.num_timesteps).long()

    def t_from_noise_level(self, level: Tensor) -> Tensor:
        """The timesteps (B,) whose ln(sigma / alpha) is nearest to each level (B,)."""
        return torch.bucketize(level, self.noise_level_bounds)

    # ------------------------------------------------------------ the reverse process: sampling

    def denoise(self, predict: Callable, xt: Tensor, t: int, clip: bool = True
                ) -> tuple[Tensor, Tensor]:
        """(x0_hat, eps_hat), each (B, C, H, H), from predict (see `classifier_free_guidance`).

        clip: keep x0_hat in [-1, 1], the range of images, and let eps_hat be the noise that leads
        from that x0_hat to xt.
        """
        x0_hat, eps_hat = self.x0_and_eps(predict(xt, t), xt, t)
        if clip:
            alpha, sigma = self.alpha_sigma(t)
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - alpha * x0_hat) / sigma
        return x0_hat, eps_hat

    def q_posterior(self, x0: Tensor, xt: Tensor, t: int) -> tuple[Tensor, float]:
        """Mean (B, C, H, H) and variance of q(x_{t-1} | xt, x0). DDPM eq. 6, 7."""
        bar, bar_prev = self.alpha_bar_at(t), self.alpha_bar_at(t - 1)
        beta = 1 - bar / bar_prev
        x0_share = bar_prev**0.5 * beta / (1 - bar)
        xt_share = (1 - beta) ** 0.5 * (1 - bar_prev) / (1 - bar)
        return x0_share * x0 + xt_share * xt, beta * (1 - bar_prev) / (1 - bar)

    def alpha_bar_at(self, t: int) -> float:
        """alpha_bar_t as a number; 1 at t = -1, where the image is clean."""
        return self.alpha_bar[t].item() if t >= 0 else 1.0

    @torch.no_grad()
    def ddpm_sample(self, predict: Callable, xT: Tensor,
                    noise: Callable[[int], Tensor] | None = None, clip: bool = True
                    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Go back from pure noise xT (B, C, H, H) to images, one timestep at a time.

        Yields (t, x_next, x0_hat) after each step, t = 999..0: the less noisy image that the step
        from t made, and the clean image that it assumed. The last x_next is the sample. DDPM
        algorithm 2, with the posterior's variance. noise(t): what step t adds (default: randn).
        """
        noise = noise or (lambda t: torch.randn_like(xT))
        xt = xT
        for t in reversed(range(self.num_timesteps)):
            x0_hat, _ = self.denoise(predict, xt, t, clip)
            x_next, variance = self.q_posterior(x0_hat, xt, t)
            if t > 0:
                x_next = x_next + variance**0.5 * noise(t)
            yield t, x_next, x0_hat
            xt = x_next

    @torch.no_grad()
    def ddim_sample(self, predict: Callable, xT: Tensor,
                    noise: Callable[[int], Tensor] | None = None, clip: bool = True,
                    steps: int = 50, eta: float = 0.0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`ddpm_sample` in fewer steps: Song et al., arXiv 2010.02502, eq. 12 and 16.

        Training fixes only how noisy each xt is, not how consecutive xt relate. So a step may go
        from t straight to any earlier t_next (from t = 0 to -1: the image): it mixes x0_hat and
        eps_hat in t_next's proportions. New noise of variance
        eta^2 (1 - bar_next) / (1 - bar) (1 - bar / bar_next), bar = alpha_bar, replaces as much
        of eps_hat's: eta = 0 adds none (xT decides), eta = 1 over all timesteps is DDPM.
        Yields (t, x_next, x0_hat) for each t of `ddim_timesteps(steps)`."""
        noise = noise or (lambda t: torch.randn_like(xT))
        xt, timesteps = xT, self.ddim_timesteps(steps)
        for t, t_next in zip(timesteps, timesteps[1:] + [-1], strict=True):
            x0_hat, eps_hat = self.denoise(predict, xt, t, clip)
            bar, bar_next = self.alpha_bar_at(t), self.alpha_bar_at(t_next)
            std = eta * ((1 - bar_next) / (1 - bar) * (1 - bar / bar_next)) ** 0.5
            x_next = bar_next**0.5 * x0_hat + max(1 - bar_next - std**2, 0.0) ** 0.5 * eps_hat
            if std > 0:
                x_next = x_next + std * noise(t)
            yield t, x_next, x0_hat
            xt = x_next

    def ddim_timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps, evenly spaced, from 999 down to 0 with both ends (one step: 999).

        Raises ValueError unless 1 <= steps <= num_timesteps.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"{steps} sampling steps: from 1 to {self.num_timesteps} are possible")
        spaced = torch.linspace(self.num_timesteps - 1, 0, steps, dtype=torch.float64)
        return spaced.round().long().tolist()


# ---------------------------------------------------------------- guidance


def classifier_free_guidance(model, y: Tensor, cfg_scale: float) -> Callable[[Tensor, int], Tensor]:
    """predict(xt, t): the model's output for the classes y (B,), moved away from "no class".

        out_uncond + cfg_scale (out_cond - out_uncond)

    Ho & Salimans, arXiv 2207.12598, eq. 6 in the form DiT uses: cfg_scale = 1 is the plain
    conditional model, 0 the unconditional one (a single forward each), and above 1 exaggerates
    what the class changes (both halves in one batch). Guiding the output is the same as guiding
    eps: for a given xt each is an affine function of the other. `model.null_class` is "no class".
    """
    null = torch.full_like(y, model.null_class)

    def predict(xt: Tensor, t: int) -> Tensor:
        steps = torch.full((len(xt),), t, device=xt.device)
        if cfg_scale == 1:
            return model(xt, steps, y)
        if cfg_scale == 0:
            return model(xt, steps, null)
        out = model(torch.cat([xt, xt]), torch.cat([steps, steps]), torch.cat([y, null]))
        out_cond, out_uncond = out.chunk(2)
        return out_uncond + cfg_scale * (out_cond - out_uncond)

    return predict


if __name__ == "__main__":
    x0, eps = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    t = torch.tensor([0, 300, 600, 999])
    for prediction in PREDICTIONS:
        diffusion = GaussianDiffusion(prediction=prediction)
        xt, target = diffusion.q_sample(x0, t, eps), diffusion.target(x0, eps, t)
        x0_hat, eps_hat = diffusion.x0_and_eps(target, xt, t)
        assert torch.allclose(x0_hat, x0, atol=1e-3) and torch.allclose(eps_hat, eps, atol=1e-3)
        loss = diffusion.loss(lambda xt, t, y, out=target: out, x0, t, None, eps)
        assert not loss.any(), "the right output has no loss"

        def perfect(xt, t, d=diffusion):        # a network that knows x0
            return d.target(x0, (xt - d.alpha[t] * x0) / d.sigma[t], t)

        *_, (_, sample, _) = diffusion.ddim_sample(perfect, eps, steps=10)
        assert torch.allclose(sample, x0, atol=1e-3), "a perfect network leads back to x0"
        print(f"{prediction:3}  target -> x0_hat, eps_hat to 1e-3; 10 DDIM steps lead back to x0")
    print("   t  alpha_bar    alpha    sigma")
    for i in t.tolist():
        print(f"{i:4}  {diffusion.alpha_bar[i]:9.5f}  {diffusion.alpha[i]:7.4f}  "
              f"{diffusion.sigma[i]:7.4f}")
