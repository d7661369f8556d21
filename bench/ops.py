"""The ops against what they replace: the same arithmetic as eager torch calls.

python bench/ops.py [--device cuda] [--quick] writes bench/ops.csv and prints Markdown. A form is
compared with the op's reference before it is timed, and one that differs has no row. Forms take
turns in one process; pytest-benchmark, grouped by op, shows their spread on stderr.
"""

from __future__ import annotations

import os
import sys

from sweeps import CALM


def main() -> int:
    if any(os.environ.get(name) != value for name, value in CALM.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CALM)
    import op_bench

    return op_bench.main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
