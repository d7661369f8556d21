"""What every engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fasttrace.adapters.pipeline import Start
from fasttrace.adapters.text import Text
from fasttrace.types import Lane, Sampling

CLEAN, CORRUPT, FLOOR = "clean", "corrupt", "floor"


@dataclass(frozen=True)
class Pair:
    """All runs of one (prompt, seed)."""

    texts: Mapping[str, Text]  # "clean", "corrupt", and every "prompt:..." that a patch reads
    base: str  # the text that lanes run on: "corrupt" in a trace, "clean" in a swap
    start: Start
    sampling: Sampling
    lanes: tuple[Lane, ...]
    # text-encoder tracing: every lane has a text of its own
    lane_texts: Callable[[Sequence[Lane]], list[Text]] | None = None
    # what "tensor:..." and "add:..." sources name: [1 or calls, ...], see `sources.py`
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    # told after every denoiser call of a batch: its number, the timestep, how many lanes it had
    on_step: Callable[[int, Any, int], None] | None = None


@dataclass(frozen=True)
class Finished:
    """Runs that have ended. latents [B, C, h, w], a row a run.

    A run is a pair's number and "clean", "corrupt", "floor" or a lane's number. "floor" runs are
    copies of that pair's corrupt run, made in another batch shape or row.
    """

    runs: tuple[tuple[int, str | int], ...]
    latents: Tensor


class Engine(Protocol):
    """Runs pairs. Holds no hook and no changed state of the model while it is suspended."""

    name: str

    @property
    def at_once(self) -> int:
        """How many pairs it likes to be given together."""
        ...

    def run(self, pairs: Sequence[Pair]) -> Iterator[Finished]:
        """Every run of the pairs, as they come.

        A pair's clean and corrupt runs come before its lanes; the copies that make up the noise
        floor of a batch shape come before, or with, the first lanes that were run in it.
        """
        ...
