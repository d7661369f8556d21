"""Set before anything imports triton: `triton.jit` reads it when a kernel is defined."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
