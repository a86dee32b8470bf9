// The process: diffusion.py in plain JavaScript, with its names and in its order. x0 is a clean
// image in [-1, 1], eps standard normal noise, xt = alpha x0 + sigma eps; `_hat` marks estimates.
// Timesteps are 0..999. Images are Float32Arrays (B, C, H, H).

const map2 = (f, a, b) => a.map((value, i) => f(value, b[i]));

export class GaussianDiffusion {
  constructor({ num_timesteps = 1000, beta_start = 1e-4, beta_end = 0.02, prediction = "x0" }) {
    Object.assign(this, { num_timesteps, prediction });
    let product = 1;
    this.alpha_bar = linspace(beta_start, beta_end, num_timesteps).map(beta => product *= 1 - beta);
    this.alpha = Float32Array.from(this.alpha_bar, bar => Math.sqrt(bar));
    this.sigma = Float32Array.from(this.alpha_bar, bar => Math.sqrt(1 - bar));
  }

  /** Noise x0 to timestep t in one jump, with the noise eps. DDPM eq. 4. */
  q_sample(x0, t, eps) {
    return map2((x0, eps) => this.alpha[t] * x0 + this.sigma[t] * eps, x0, eps);
  }

  /** The first half of x0_and_eps: the x0_hat that the output implies. DDPM eq. 15. */
  x0_hat(out, xt, t) {
    const alpha = this.alpha[t], sigma = this.sigma[t];
    if (this.prediction === "eps") return map2((xt, eps) => (xt - sigma * eps) / alpha, xt, out);
    if (this.prediction === "v") return map2((xt, v) => alpha * xt - sigma * v, xt, out);
    return out;
  }

  /** [x0_hat, eps_hat] from predict (see `classifier_free_guidance`), x0_hat kept in [-1, 1] and
      eps_hat the noise that leads from it to xt. */
  denoise(predict, xt, t) {
    const x0_hat = this.x0_hat(predict(xt, t), xt, t).map(x => Math.min(Math.max(x, -1), 1));
    return [x0_hat, map2((xt, x0) => (xt - this.alpha[t] * x0) / this.sigma[t], xt, x0_hat)];
  }

  /** Song et al., arXiv 2010.02502, eq. 12 and 16. Yields {t, xt, x_next, x0_hat} for the timesteps
      of `ddim_timesteps(steps)`, from number `first` on. noise(t): what step t adds if eta > 0. */
  *ddim_sample(predict, xT, { noise, steps = 50, eta = 0, first = 0 }) {
    const timesteps = this.ddim_timesteps(steps), alpha_bar = t => this.alpha_bar[t] ?? 1;
    let xt = xT;
    for (let i = first; i < steps; i++) {
      const t = timesteps[i], [x0_hat, eps_hat] = this.denoise(predict, xt, t);
      const bar = alpha_bar(t), bar_next = alpha_bar(timesteps[i + 1]);         // 1 after the last
      const std = eta * Math.sqrt((1 - bar_next) / (1 - bar) * (1 - bar / bar_next));
      const [x0_share, eps_share] = [bar_next, Math.max(1 - bar_next - std ** 2, 0)].map(Math.sqrt);
      let x_next = map2((x0, eps) => x0_share * x0 + eps_share * eps, x0_hat, eps_hat);
      if (std > 0) x_next = map2((x, noise) => x + std * noise, x_next, noise(t));
      yield { t, xt, x_next, x0_hat };
      xt = x_next;
    }
  }

  /** `steps` timesteps, evenly spaced, from 999 down to 0 with both ends (one step: 999). */
  ddim_timesteps(steps) {                           // a half is rounded to even, as in PyTorch
    return Array.from(linspace(this.num_timesteps - 1, 0, steps), t =>
      t % 1 === 0.5 ? 2 * Math.round(t / 2) : Math.round(t));
  }
}

/** torch.linspace in float64: from both ends towards the middle. */
function linspace(start, end, count) {
  const step = (end - start) / (count - 1 || 1);
  return Float64Array.from({ length: count }, (_, i) =>
    i < Math.max(count >> 1, 1) ? start + step * i : end - step * (count - 1 - i));
}

/** predict(xt, t): the model's output for the classes y (B,), moved away from "no class":
    out_uncond + cfg_scale (out_cond - out_uncond). Ho & Salimans, arXiv 2207.12598. */
export function classifier_free_guidance(model, y, cfg_scale) {
  const nulls = y.map(() => model.null_class);
  return (xt, t) => {
    const steps = y.map(() => t), size = xt.length;
    if (cfg_scale === 1) return model.forward(xt, steps, y).slice(0, size);
    if (cfg_scale === 0) return model.forward(xt, steps, nulls).slice(0, size);
    const both = Float32Array.of(...xt, ...xt);                                 // in one batch
    const out = model.forward(both, [...steps, ...steps], [...y, ...nulls]);
    return xt.map((_, i) => out[size + i] + cfg_scale * (out[i] - out[size + i]));
  };
}
