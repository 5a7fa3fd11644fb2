"""Sets how OpenMP's idle threads wait: they spin for a while, then sleep (docs/decisions.md).

Threads that spin without end bring a busy machine to a halt. torch's OpenMP reads the variable when torch is imported,
so the packages whose modules are started as commands import this one first.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "100000")
