"""How OpenMP's threads wait. Import before torch: libgomp reads its environment when it is loaded.

A training step on a CPU consists of some hundreds of short parallel regions. At the end of each,
libgomp (GCC's OpenMP, in torch's Linux wheels) lets the threads that are done spin for
milliseconds before they sleep; where another program uses a core, they spin while the thread they
wait for does not run. A short spin is as fast on an idle machine and does not collapse on a busy
one: docs/experiments.md, "A machine in use". Values that the user has set are kept.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
