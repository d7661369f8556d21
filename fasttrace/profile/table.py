"""The profile in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fasttrace.profile.records import Line, Profile
from fasttrace.profile.words import kind_name, percent, scaled, seconds, shown

WIDTH = 126  # of a table that goes to a file or a pipe


def print_profile(found: Profile, console: Console, sites: int) -> None:
    """sites: how many of the slowest to list."""
    console.print(_head(found))
    console.print(_table("by kind", found, found.kinds, [kind_name(x.name) for x in found.kinds]))
    console.print(_table("by operator", found, found.ops, [line.name for line in found.ops]))
    slowest = sorted(found.sites, key=lambda line: -line.seconds)[:sites]
    if slowest:
        title = f"the {len(slowest)} slowest of {len(found.sites)} sites"
        console.print(_table(title, found, slowest, [line.site for line in slowest], short=True))
    for word, sentence in facts(found):
        console.print(Text(f"{word:<10}{sentence}"), soft_wrap=True)


def console_for() -> Console:
    """Of the terminal's width; where there is none, as wide as the tables want to be."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDTH)


def facts(found: Profile) -> list[tuple[str, str]]:
    """What the tables don't say: a word, and a sentence about it."""
    work, costs, ceilings = found.work, found.costs, found.ceilings
    dtype = found.dtype
    speed = f"{found.lanes_a_second:.3g} lanes a second ({found.lanes} in {seconds(found.seconds)}"
    sharing = (
        f"{percent(work.sharing)} of {scaled(work.executed, 'FLOP')} is what {found.lanes} patched "
        f"runs need; a whole run a lane would be {work.saved:.2f} times the work done"
    )
    least = seconds(ceilings.dispatch)
    host = (
        f"{seconds(found.host)} a step in which no operator ran; {found.steps} steps with "
        f"{found.operators:.0f} operators each, of which the least takes {least}"
    )
    ceiling = (
        f"{scaled(ceilings.of(dtype), 'FLOP/s')} in a {dtype} {ceilings.by[dtype]}, "
        f"{scaled(ceilings.copy.highest, 'B/s')} in a copy: the best of several just before"
    )
    clock = (
        f"read {costs.ticks:,} times, {seconds(costs.tick)} each; the run took "
        f"{seconds(costs.clocked)} with it, {seconds(costs.plain)} without"
    )
    same = "equal those without the clock, bit for bit"
    return [
        ("speed", f"{speed} without the clock)"),
        ("sharing", sharing),
        ("host", host),
        ("ceilings", ceiling),
        ("memory", memory_words(found)),
        ("clock", clock),
        ("scores", same if costs.same else "DIFFER from those without the clock"),
    ]


def memory_words(found: Profile) -> str:
    sizes = [size for _, size in found.memory]
    own = max(found.alive.bytes, default=0) if found.alive is not None else 0
    said = f"{scaled(max(sizes), 'B')} at most {found.memory_is}, " if sizes else ""
    return f"{said}{scaled(own, 'B')} of it tensors of one step, by their shapes"


def _head(found: Profile) -> Text:
    head = Text(f"{shown(found.model)}: {found.lanes} lanes, {found.steps} steps", style="bold")
    head.append(f"\n{shown(found.prompt)}\n", style="not bold")
    about = ", ".join(
        f"{name} {value}" for name, value in found.about.items() if name != "versions"
    )
    return head.append(shown(about), style="dim not bold")


def _table(
    title: str, found: Profile, lines: Iterable[Line], names: Iterable[str], short: bool = False
) -> Table:
    """short: without amounts, for long names."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(title, overflow="fold")
    heads = ("calls", "time", "share", "work", "rate", "of GEMM", "moved", "rate", "of copy")
    kept = [i for i in range(len(heads)) if not (short and i in (3, 6, 7))]
    for i in kept:
        table.add_column(heads[i], justify="right", no_wrap=True)
    for name, line in zip(names, lines, strict=True):
        cells = (
            f"{line.calls:,}" if line.calls else "",
            seconds(line.seconds),
            percent(line.share),
            scaled(line.flops or None, "FLOP"),
            scaled(line.flop_rate, "FLOP/s"),
            percent(found.of_gemm(line)),
            scaled(line.bytes, "B"),
            scaled(line.byte_rate, "B/s"),
            percent(found.of_copy(line)),
        )
        table.add_row(Text(shown(name)), *(cells[i] for i in kept))
    return table
