"""`--guidance-interval LO HI` and `--autoguidance CKPT`: when to guide, and away from what.

Both take the place of `diffusion.classifier_free_guidance`: from (model, y, cfg_scale) and
arguments of their own they make predict(xt, t). They can be combined.
"""

from collections.abc import Callable

from torch import Tensor

from diffusion import classifier_free_guidance


def guidance_interval(model, y: Tensor, cfg_scale: float, process, low: float, high: float,
                      guide: Callable = classifier_free_guidance) -> Callable:
    """predict(xt, t): guided by `guide` where low < sigma / alpha <= high at t, elsewhere the plain
    conditional model, a single forward.

    Kynkäänniemi et al., arXiv 2404.07724, eq. 5. Their sigma is that of x0 + sigma eps, which is
    xt / alpha, so it is sigma / alpha here. In nearly pure noise guidance costs variety, in nearly
    clean images it changes little.
    """
    guided, plain = guide(model, y, cfg_scale), classifier_free_guidance(model, y, cfg_scale=1)

    def predict(xt: Tensor, t: int) -> Tensor:
        alpha, sigma = process.alpha_sigma(t)
        return (guided if low < (sigma / alpha).item() <= high else plain)(xt, t)

    return predict


def autoguidance(model, y: Tensor, cfg_scale: float, weak) -> Callable:
    """predict(xt, t): the model's output for the classes y, moved away from that of `weak`.

        out_weak + cfg_scale (out - out_weak)

    Karras et al., arXiv 2406.02507, eq. 3. weak: a worse model of the same data, smaller or less
    trained. It makes the same errors, only larger ones, and it sees the same class: what is
    exaggerated is the model's quality and not what the class changes. 1 is the plain model.
    """
    strong, weaker = (classifier_free_guidance(m, y, cfg_scale=1) for m in (model, weak))

    def predict(xt: Tensor, t: int) -> Tensor:
        if cfg_scale == 1:
            return strong(xt, t)
        out_weak = weaker(xt, t)
        return out_weak + cfg_scale * (strong(xt, t) - out_weak)

    return predict
