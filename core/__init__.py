"""What train.py, the tools and the studies share: the command line, errors, run folders, the life of a run."""

import os

# Before torch is imported: OpenMP threads that spin without end bring a busy machine to a halt (docs/decisions.md).
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
