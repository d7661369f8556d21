"""How the fast engine runs lanes: choices that change speed and memory, not what is computed."""

from __future__ import annotations

from dataclasses import dataclass

from fasttrace.engine.cache import HOMES
from fasttrace.errors import UsageError

CLEAN_MODES = ("auto", "leader", "cache")
ATTENTIONS = ("auto", "torch", "fused")
SMALLEST = 4  # lanes: a leader, two copies of the corrupt run, one patched lane


@dataclass(frozen=True)
class Options:
    """How lanes are run. None of it changes what is computed, only how sums are rounded.

    clean: where lanes read activations, "leader" (the source is a lane of every batch: nothing is
    stored), "cache" (recorded once) or "auto" (recorded as far as `cache` bytes reach).
    home: where the cache lies, "device" or "host" (pinned, fetched ahead). lanes: the most in a
    batch; 26 are 24 pairs at one site and two copies, and 32 or 48 were no faster on a CPU.
    runner: see `runners.RUNNERS`; None is a CUDA graph on CUDA, else the graph's code. pairs: the
    most whose lanes are run together. pruning, sharing: leave out what a replaced site
    makes superfluous, and what lanes have in common at the call they open at. staged: read the
    cache through staging slots, as captured graphs have to; None is where they are. attention:
    "fused" is our kernel, "torch" torch's own; "auto" is ours on CUDA in half precision, where
    triton is installed.
    """

    clean: str = "auto"
    home: str = "device"
    runner: str | None = None
    lanes: int = 26
    pairs: int = 24
    cache: int = 1 << 30
    pruning: bool = True
    sharing: bool = True
    staged: bool | None = None
    attention: str = "auto"

    def __post_init__(self) -> None:
        choices = (("clean", CLEAN_MODES), ("home", HOMES), ("attention", ATTENTIONS))
        for name, known in choices:
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise UsageError(f"{name} is one of {', '.join(known)}, not {given!r}.")
        for name in ("lanes", "pairs", "cache"):
            given = getattr(self, name)
            if not isinstance(given, int) or isinstance(given, bool) or given < 0:
                raise UsageError(f"{name} is a whole number of 0 or more, not {given!r}.")
        if self.lanes < SMALLEST:
            raise UsageError(
                f"A batch has at least {SMALLEST} lanes (a leader, two copies of the corrupt run "
                f"and one patched lane); {self.lanes} were asked for."
            )
        if self.pairs < 1:
            raise UsageError(f"At least one pair is run at a time, not {self.pairs}.")
