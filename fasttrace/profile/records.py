"""What a profile is made of: measured numbers, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fasttrace.profile.ceilings import Ceilings


@dataclass(frozen=True)
class Span:
    """A stretch of time, in nanoseconds of the host's clock. kind: run, batch, step, site, op,
    phase (what is no step). device: measured in a CUDA stream, not on the host."""

    kind: str
    name: str
    start: int
    stop: int
    about: Mapping[str, Any]
    device: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a table. flops, bytes: None where they are not counted.

    share: of the whole time. site: the path of a single site, else "".
    """

    name: str
    calls: int
    seconds: float
    share: float
    flops: int | None = None
    bytes: int | None = None
    site: str = ""

    @property
    def flop_rate(self) -> float | None:
        return self.flops / self.seconds if self.flops and self.seconds else None

    @property
    def byte_rate(self) -> float | None:
        return self.bytes / self.seconds if self.bytes and self.seconds else None

    def least(self, flop_rate: float, byte_rate: float) -> tuple[float, str] | None:
        """Seconds at the machine's ceilings, and which of the two binds; None if not counted."""
        if not self.seconds or (self.flops is None and self.bytes is None):
            return None
        product, copy = (self.flops or 0) / flop_rate, (self.bytes or 0) / byte_rate
        return max(product, copy), "arithmetic" if product >= copy else "memory"


@dataclass(frozen=True)
class Alive:
    """Bytes of a graph's own tensors at each of its operators, with the site at work, in order."""

    name: str
    sites: tuple[str, ...]
    kinds: tuple[str, ...]
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """FLOPs. executed: of a run. useful: the runs asked for alone. bound: the least that an exact
    trace needs. plain: one whole run a lane. predicted: what a plan foretells."""

    executed: int
    predicted: int
    useful: int
    bound: int
    plain: int

    @property
    def sharing(self) -> float:
        """Useful work by work done."""
        return self.useful / self.executed

    @property
    def saved(self) -> float:
        """Whole runs by work done."""
        return self.plain / self.executed


@dataclass(frozen=True)
class Costs:
    """What measuring costs. plain, clocked: seconds of the same run without and with the clock.

    tick: seconds of one reading. same: whether the scores are equal bit for bit.
    """

    plain: float
    clocked: float
    tick: float
    ticks: int
    same: bool

    @property
    def share(self) -> float:
        return self.clocked / self.plain - 1


@dataclass(frozen=True)
class Profile:
    """A profile. seconds: of the run without the clock, in its usual runner. kinds, ops, sites:
    of the run with it. steps: calls of compiled steps, shared calls included.

    host: seconds a step in which no operator ran, on the host; on a GPU, those it takes to issue
    one. operators: of a step, on average. memory: (nanoseconds, bytes) after each step.
    """

    model: str
    prompt: str
    subject: str
    about: Mapping[str, str]
    lanes: int
    pairs: int
    batches: int
    steps: int
    seconds: float
    total: float
    kinds: tuple[Line, ...]
    ops: tuple[Line, ...]
    sites: tuple[Line, ...]
    host: float
    operators: float
    work: Work
    costs: Costs
    ceilings: Ceilings
    dtype: str
    memory: tuple[tuple[int, int], ...]
    memory_is: str
    alive: Alive | None
    spans: tuple[Span, ...]
    left_out: int  # spans that there was no room for

    @property
    def lanes_a_second(self) -> float:
        return self.lanes / self.seconds

    @property
    def counted(self) -> tuple[Line, ...]:
        """Kinds whose FLOPs and bytes are known: operators."""
        return tuple(line for line in self.kinds if line.bytes is not None)

    def of_gemm(self, line: Line) -> float | None:
        """FLOP/s by those of a matrix product."""
        return line.flop_rate and line.flop_rate / self.ceilings.of(self.dtype)

    def of_copy(self, line: Line) -> float | None:
        """Bytes a second by those of a copy."""
        return line.byte_rate and line.byte_rate / self.ceilings.copy.highest

    def of_ceiling(self, line: Line) -> tuple[float, str] | None:
        """A line's time at the ceilings by its own, and what binds."""
        least = line.least(self.ceilings.of(self.dtype), self.ceilings.copy.highest)
        return None if least is None else (least[0] / line.seconds, least[1])

    def as_data(self) -> dict[str, Any]:
        """Everything but the spans, as JSON takes it."""
        kept = [f.name for f in fields(self) if f.name not in ("spans", "alive", "about")]
        data = {name: getattr(self, name) for name in kept}
        for name in ("kinds", "ops", "sites"):
            data[name] = [self._line(line) for line in data[name]]
        for name in ("work", "costs", "ceilings"):
            data[name] = asdict(data[name])
        return {**data, "about": dict(self.about), "lanes_a_second": self.lanes_a_second,
                "sharing": self.work.sharing}  # fmt: skip

    def _line(self, line: Line) -> dict[str, Any]:
        found = self.of_ceiling(line)
        share, binds = (None, None) if found is None else found
        rates = {"of_gemm": self.of_gemm(line), "of_copy": self.of_copy(line)}
        return {**asdict(line), **rates, "of_ceiling": share, "binds": binds}
