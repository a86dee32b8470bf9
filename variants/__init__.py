"""Networks, processes and ways to sample beside the lesson's: docs/variants.md, docs/sampling.md.

support/components.py adds these names to its own. Nothing is imported before its name is given, by
a flag or by a checkpoint, and the lesson's four files never import a variant.
"""

NETWORKS = {            # --network NAME: "module:class"
    "in-context": "variants.in_context:InContextDiT",
    "cross-attention": "variants.cross_attention:CrossAttentionDiT",
    "adaln": "variants.adaln:AdaLNDiT",
    "registers": "variants.registers:RegisterDiT",
    "modern": "variants.modern:ModernDiT",
}
PROCESSES = {           # --process NAME
    "learned-variance": "variants.learned_variance:LearnedVariance",
    "rectified-flow": "variants.rectified_flow:RectifiedFlow",
}
SAMPLERS = {            # --sampler NAME, of any process with alpha_sigma: "module:function"
    "dpm++": "variants.dpm_solver:dpm_solver_sample",
}
GUIDANCE = {            # --guidance-interval LO HI, --autoguidance CKPT
    "interval": "variants.guidance:guidance_interval",
    "autoguidance": "variants.guidance:autoguidance",
}
FLAGS = {               # a constructor's argument: its flag's type, least and greatest value, help
    "registers": (int, 0, 1024, "number of register tokens, with --network registers (default: 4)"),
}
