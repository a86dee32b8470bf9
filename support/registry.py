"""Networks, processes, samplers and guidance by name: what a flag or a checkpoint may ask for.

The lesson registers its own in sample.py, variants/__init__.py the others. Add yours likewise.
"""

NETWORKS: dict[str, type] = {}      # network(**arguments)(xt, t, y)
PROCESSES: dict[str, type] = {}     # process(**arguments); a sampler NAME is its method NAME_sample
SAMPLERS: dict[str, object] = {}    # beside a process's own: sampler(process, predict, xT, ...)
GUIDANCE: dict[str, object] = {}    # beside classifier_free_guidance
