"""The process: DDPM's noise, what the network learns from it, and the way back.   [read this first]

Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models" (DDPM), arXiv 2006.11239.

    forward    xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps     DDPM eq. 4    q_sample
    learn      || target - model(xt, t, y) ||^2                      DDPM eq. 14   loss
    estimate   x0_hat = (xt - sqrt(1 - alpha_bar) eps_hat)           DDPM eq. 15   predict_x0,
                        / sqrt(alpha_bar), or its form for v and x0                PREDICTIONS
    step back  q(x_{t-1} | xt, x0) = N(mean, variance)               DDPM eq. 6-7  q_posterior
    guide      eps_uncond + s (eps_cond - eps_uncond)                2207.12598    guided_output

x0 is a clean image in [-1, 1], eps is standard normal noise, xt the mixture of both, `_hat` marks
the network's estimates. beta_t is the noise added at step t, alpha_bar_t the product of all
(1 - beta_s) up to and including s = t: the share of the image's variance that is left.
Timesteps are t = 0..999, the paper's 1..1000 less one: t = 0 is the least noisy image, x_{-1} is
x0 itself, and the step from t = 0 adds no noise.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# What the output of the network means: (output, xt, a, s) -> (x0_hat, eps_hat), where
# a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t) and so xt = a x0 + s eps. v = a eps - s x0 is its
# partner: since a^2 + s^2 = 1, a xt - s v = x0 and s xt + a v = eps. The training here predicts v.
PREDICTIONS: dict[str, Callable] = {
    "eps": lambda out, xt, a, s: ((xt - s * out) / a, out),                  # DDPM, DiT
    "v": lambda out, xt, a, s: (a * xt - s * out, s * xt + a * out),         # arXiv 2202.00512
    "x0": lambda out, xt, a, s: (out, (xt - a * out) / s),
}
# What the output should have been: (x0, eps, a, s) -> target.
TARGETS: dict[str, Callable] = {
    "eps": lambda x0, eps, a, s: eps,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
    "x0": lambda x0, eps, a, s: x0,
}


class GaussianDiffusion:
    """DDPM's process with its linear schedule of beta, and one meaning of the network's output.

    num_timesteps, beta_start, beta_end: the schedule (DDPM section 4: 1000, 1e-4, 0.02).
    prediction: "eps" (the paper), "v" or "x0". Raises ValueError for any other.
    `alpha_bar` is kept in float64 on the CPU, for the samplers' numbers; the tables that training
    indexes with a batch of t are float32, and `to(device)` moves them.
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
                 prediction: str = "eps"):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r} is none of {', '.join(PREDICTIONS)}")
        self.num_timesteps, self.prediction = num_timesteps, prediction
        beta = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        self.alpha_bar = alpha_bar
        self.tables = {name: table.float() for name, table in {
            # for q(xt | x0) and its inverses
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            # for q(x_{t-1} | xt, x0)
            "posterior_x0": alpha_bar_prev.sqrt() * beta / (1 - alpha_bar),
            "posterior_xt": (1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
            "posterior_variance": beta * (1 - alpha_bar_prev) / (1 - alpha_bar),
        }.items()}

    def to(self, device) -> "GaussianDiffusion":
        """Move the float32 tables to `device`, once. Returns self."""
        self.tables = {name: table.to(device) for name, table in self.tables.items()}
        return self

    def at(self, name: str, t: Tensor) -> Tensor:
        """Row t of a table for every image of a batch: t (B,) -> (B, 1, 1, 1), float32."""
        return self.tables[name][t].view(-1, 1, 1, 1)

    # ------------------------------------------------------------ forward, and what is learned

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise x0 (B, C, H, H) to timesteps t (B,) in one jump, with the noise eps. DDPM eq. 4."""
        return self.at("sqrt_alpha_bar", t) * x0 + self.at("sqrt_one_minus_alpha_bar", t) * eps

    def loss(self, model, x0: Tensor, t: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """Squared error of model(xt, t, y) in the output's own space, a mean per image: (B,).

        DDPM eq. 14 ("simple" loss) where the output is eps. All shapes as in `q_sample`; y (B,).
        """
        a, s = self.at("sqrt_alpha_bar", t), self.at("sqrt_one_minus_alpha_bar", t)
        out = model(self.q_sample(x0, t, eps), t, y)
        out = out[:, : x0.shape[1]]     # without the variances that a learn_sigma model adds
        target = TARGETS[self.prediction](x0, eps, a, s)
        return (out.float() - target).square().mean(dim=(1, 2, 3))

    def loss_in_eps(self, loss: Tensor, t: Tensor) -> Tensor:
        """The errors (B,) of `loss` as errors in eps, so that predictions can be compared.

        For a given xt, eps_hat is linear in the output: its error is that of the output times
        sqrt(alpha_bar) for v, and times sqrt(alpha_bar / (1 - alpha_bar)) for x0.
        """
        a2 = self.tables["sqrt_alpha_bar"][t].square()
        s2 = self.tables["sqrt_one_minus_alpha_bar"][t].square()
        return loss * {"eps": 1.0, "v": a2, "x0": a2 / s2}[self.prediction]

    # ------------------------------------------------------------ back

    def predict_x0(self, xt: Tensor, t: Tensor, eps_hat: Tensor) -> Tensor:
        """The clean image that xt and the predicted noise imply. DDPM eq. 15 (text).

        For a reader to try: the samplers take it from PREDICTIONS, which knows v and x0 too.
        """
        s = self.at("sqrt_one_minus_alpha_bar", t)
        return (xt - s * eps_hat) / self.at("sqrt_alpha_bar", t)

    def q_posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, H) and variance (B, 1, 1, 1) of q(x_{t-1} | xt, x0). DDPM eq. 6, 7."""
        mean = self.at("posterior_x0", t) * x0 + self.at("posterior_xt", t) * xt
        return mean, self.at("posterior_variance", t)

    def estimate(self, model, xt: Tensor, t: int, y: Tensor, cfg_scale: float, clip: bool
                 ) -> tuple[Tensor, Tensor]:
        """(x0_hat, eps_hat), each (B, C, H, H), at one timestep t for the whole batch.

        Guide first; then clip x0_hat to [-1, 1], the range of images; then let eps_hat be the
        noise that leads from the clipped x0_hat to xt.
        """
        steps = torch.full((len(xt),), t, device=xt.device)
        out = guided_output(model, xt, steps, y, cfg_scale)[:, : xt.shape[1]].float()
        a, s = self.alpha_bar[t].sqrt().item(), (1 - self.alpha_bar[t]).sqrt().item()
        x0_hat, eps_hat = PREDICTIONS[self.prediction](out, xt, a, s)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - a * x0_hat) / s
        return x0_hat, eps_hat

    @torch.no_grad()
    def ddpm_sample(self, model, xT: Tensor, y: Tensor, cfg_scale: float = 1.0,
                    noise: Callable[[int], Tensor] | None = None, clip: bool = True
                    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Walk back from pure noise xT (B, C, H, H) to images of the classes y (B,).

        Yields (t, xt, x0_hat) after each step, t = 999..0: what the step made and what it took
        the clean image to be. The last xt is the sample. DDPM algorithm 2, with the posterior's
        variance. `noise(t)` gives the noise that step t adds (standard normal by default).
        """
        noise = noise or (lambda t: torch.randn_like(xT))
        xt = xT
        for t in reversed(range(self.num_timesteps)):
            x0_hat, _ = self.estimate(model, xt, t, y, cfg_scale, clip)
            xt, variance = self.q_posterior(x0_hat, xt, torch.tensor([t], device=xt.device))
            if t > 0:
                xt = xt + variance.sqrt() * noise(t)
            yield t, xt, x0_hat

    # ============================================================ optional from here

    def ddim_timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps, evenly spaced, from 999 down to 0 with both ends (one step: 999).

        Raises ValueError unless 1 <= steps <= num_timesteps.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"{steps} sampling steps: from 1 to {self.num_timesteps} are possible")
        spaced = torch.linspace(self.num_timesteps - 1, 0, steps, dtype=torch.float64)
        return spaced.round().long().tolist()

    @torch.no_grad()
    def ddim_sample(self, model, xT: Tensor, y: Tensor, cfg_scale: float = 1.0,
                    noise: Callable[[int], Tensor] | None = None, clip: bool = True,
                    steps: int = 50, eta: float = 0.0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`ddpm_sample` in fewer steps: Song et al., arXiv 2010.02502, eq. 12 and 16.

        eta = 0 adds no noise at all, so that xT alone decides the sample; eta = 1 over all
        timesteps is `ddpm_sample`. Yields (t, xt, x0_hat) for each of `ddim_timesteps(steps)`.
        """
        noise = noise or (lambda t: torch.randn_like(xT))
        xt, timesteps = xT, self.ddim_timesteps(steps)
        for t, t_next in zip(timesteps, timesteps[1:] + [None], strict=True):
            x0_hat, eps_hat = self.estimate(model, xt, t, y, cfg_scale, clip)
            now = self.alpha_bar[t].item()
            then = 1.0 if t_next is None else self.alpha_bar[t_next].item()
            sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
            xt = then**0.5 * x0_hat + max(1 - then - sigma**2, 0.0) ** 0.5 * eps_hat
            if sigma > 0:
                xt = xt + sigma * noise(t)
            yield t, xt, x0_hat


def guided_output(model, xt: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance: out_uncond + s (out_cond - out_uncond), s = cfg_scale.

    Ho & Salimans, arXiv 2207.12598, eq. 6 in the form DiT uses, where s = 1 is the plain
    conditional model, s = 0 the unconditional one (a single forward each), and s > 1 goes beyond
    the condition (both halves in one batched forward). Guiding the output guides eps just so:
    for a given xt the one is linear in the other. `model.null_class` is the label "no class".
    """
    if cfg_scale == 1:
        return model(xt, t, y)
    null = torch.full_like(y, model.null_class)
    if cfg_scale == 0:
        return model(xt, t, null)
    out = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, null]))
    out_cond, out_uncond = out.float().chunk(2)
    return out_uncond + cfg_scale * (out_cond - out_uncond)
