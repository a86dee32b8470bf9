"""`--process rectified-flow`: from noise to images along straight lines.

Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747; SiT, arXiv 2401.08740.

    xt = (1 - s) x0 + s eps              s from 0 (clean) to 1 (noise)      q_sample
    v = d xt / d s = eps - x0                                               target
    d x / d s = the network's v          integrated from s = 1 to 0         euler, heun

alpha = 1 - s and sigma = s take the place of DDPM's two tables; the loss, its weightings, the
three predictions and `denoise` are inherited and mean the same. Timesteps are any numbers from 0 to
num_timesteps - 1, with s = (t + 1) / num_timesteps: the network's input has the range it has in
the lesson, t = 999 is pure noise, and t = -1 would be x0.
"""

from collections.abc import Callable, Iterator
from functools import partialmethod

import torch
from torch import Tensor

from diffusion import GaussianDiffusion


class Line:
    """A function of s that is read like a table, at any t, and moves like a tensor."""

    def __init__(self, f: Callable[[Tensor], Tensor], num_timesteps: int, device="cpu"):
        self.f, self.num_timesteps, self.device = f, num_timesteps, device

    def __getitem__(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float32, device=self.device)
        return self.f((t + 1) / self.num_timesteps)

    def to(self, device) -> "Line":
        return Line(self.f, self.num_timesteps, device)


class RectifiedFlow(GaussianDiffusion):
    """The straight path between x0 and eps; prediction "v" means eps - x0.

    Samplers: "euler", one evaluation of the network per step, and "heun", of second order, two.
    """

    sampling = dict(sampler="euler")            # the default, in place of train_mnist.SAMPLING's
    ddim_sample = ddpm_sample = None            # this process has no such sampler

    def __init__(self, num_timesteps: int = 1000, prediction: str = "v", weighting: str = "plain"):
        super().__init__(num_timesteps, prediction=prediction, weighting=weighting)
        # never 0, so that x0 follows from a predicted eps (DDPM's ends at 0.006)
        self.alpha = Line(lambda s: (1 - s).clamp(min=1e-3), num_timesteps)
        self.sigma = Line(lambda s: s, num_timesteps)
        del self.alpha_bar                              # of DDPM's schedule

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0 if self.prediction == "v" else super().target(x0, eps, t)

    def x0_and_eps(self, out: Tensor, xt: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        if self.prediction != "v":
            return super().x0_and_eps(out, xt, t)
        alpha, sigma = self.alpha_sigma(t)
        total = alpha + sigma                           # 1
        return (xt - sigma * out) / total, (xt + alpha * out) / total

    def t_from_uniform(self, u: Tensor) -> Tensor:
        return u * (self.num_timesteps - 1)

    def t_from_noise_level(self, level: Tensor) -> Tensor:
        """Since s / (1 - s) is sigma / alpha, a normal level is SD3's logit-normal s, and JiT's."""
        return (level.sigmoid() * self.num_timesteps - 1).clamp(min=0)

    # ------------------------------------------------------------ back

    def velocity(self, predict: Callable, xt: Tensor, s: float, clip: bool
                 ) -> tuple[Tensor, Tensor]:
        """(v, x0_hat) at xt, from predict(xt, t)."""
        x0_hat, eps_hat = self.denoise(predict, xt, s * self.num_timesteps - 1, clip)
        return eps_hat - x0_hat, x0_hat

    @torch.no_grad()
    def euler_sample(self, predict: Callable, xT: Tensor, noise: Callable | None = None,
                     clip: bool = True, steps: int = 50, second_order: bool = False
                     ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Go from noise xT to images in `steps` equal steps of s, each along the v at its start.
        Yields (t, x_next, x0_hat) as `ddim_sample` does, with t rounded. `noise` is not used.

        second_order: along the mean of the v at its start and at the end to which that one leads
        (Heun). The last step has no other end: at s = 0 there is no noise left to see.
        """
        xt = xT
        for i in range(steps, 0, -1):
            s, s_next = i / steps, (i - 1) / steps
            v, x0_hat = self.velocity(predict, xt, s, clip)
            x_next = xt + (s_next - s) * v
            if second_order and s_next > 0:
                v_next, _ = self.velocity(predict, x_next, s_next, clip)
                x_next = xt + (s_next - s) * (v + v_next) / 2
            yield round(s * self.num_timesteps - 1), x_next, x0_hat
            xt = x_next

    heun_sample = partialmethod(euler_sample, second_order=True)
