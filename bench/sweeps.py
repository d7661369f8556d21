"""Whole sweeps side by side: the authors' way, three that people use, and fasttrace.

python bench/sweeps.py [--quick] writes bench/results.csv and prints Markdown. Every way's scores
are checked against the reference engine's before it is timed; one that differs has no row.
"""

from __future__ import annotations

import os
import sys

# Threads that spin while they wait slow small models down; OpenMP reads this once, with torch.
CALM = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def main() -> int:
    if any(os.environ.get(name) != value for name, value in CALM.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CALM)
    import run

    return run.main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
