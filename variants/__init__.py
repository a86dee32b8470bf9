"""Networks, processes, samplers and kinds of guidance beside the lesson's: docs/variants.md and
docs/sampling.md. Importing this package, as sample.py does, adds them to support/registry.py."""

from support import registry
from variants.dpm_solver import dpm_solver_sample
from variants.guidance import autoguidance, guidance_interval
from variants.learned_variance import LearnedVariance
from variants.mixing import NoAttentionDiT, PositionAttentionDiT
from variants.modern import ModernDiT
from variants.paper_blocks import AdaLNDiT, CrossAttentionDiT, InContextDiT
from variants.rectified_flow import RectifiedFlow
from variants.registers import RegisterDiT

registry.NETWORKS.update({              # --network NAME
    "in-context": InContextDiT,
    "cross-attention": CrossAttentionDiT,
    "adaln": AdaLNDiT,
    "registers": RegisterDiT,
    "modern": ModernDiT,
    "position-attention": PositionAttentionDiT,
    "no-attention": NoAttentionDiT,
})
registry.PROCESSES.update({             # --process NAME
    "learned-variance": LearnedVariance,
    "rectified-flow": RectifiedFlow,
})
registry.SAMPLERS.update({              # --sampler NAME, for any process with alpha_sigma
    "dpm++": dpm_solver_sample,
})
registry.GUIDANCE.update({              # --guidance-interval LO HI, --autoguidance CKPT
    "interval": guidance_interval,
    "autoguidance": autoguidance,
})
