"""The closed-form editor: how exact, how fast, how much memory, at the size of SD 1.x's encoder.

python bench/closed_form.py writes bench/closed_form.csv and prints Markdown. Weights are random,
the vocabulary is CLIP's own. Everything is checked before it is timed.
"""

from __future__ import annotations

import os
import sys

from sweeps import CALM


def main() -> int:
    if any(os.environ.get(name) != value for name, value in CALM.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CALM)
    import editing

    return editing.main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
