"""What every engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fasttrace.adapters.pipeline import Start
from fasttrace.adapters.text import Text
from fasttrace.types import Lane, Sampling

CLEAN, CORRUPT, FLOOR = "clean", "corrupt", "floor"


@dataclass(frozen=True)
class Pair:
    """All runs of one (prompt, seed)."""

    texts: Mapping[str, Text]  # "clean" and "corrupt"
    base: str  # the text that lanes run on: "corrupt" in a trace, "clean" in a swap
    start: Start
    sampling: Sampling
    lanes: tuple[Lane, ...]
    # text-encoder tracing: every lane has a text of its own
    lane_texts: Callable[[Sequence[Lane]], list[Text]] | None = None


class Engine(Protocol):
    """Runs a pair. Holds no hook and no changed state of the model while it is suspended."""

    name: str

    def run(self, pair: Pair) -> Iterator[tuple[str | int, Tensor]]:
        """Final latents [B, C, h, w], as they come.

        First "clean" and "corrupt" (B = 1), then "floor": copies of the corrupt run made in other
        batch shapes and rows (any B), then each lane's under its index into `pair.lanes` (B = 1),
        in any order.
        """
        ...
