"""The profile as one HTML file: no script, no network."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from fasttrace.profile import charts, words
from fasttrace.profile.records import Line, Profile
from fasttrace.profile.table import facts
from fasttrace.report.pages import environment

PAGE, TRACE = "profile.html", "trace.json"


def render(found: Profile) -> str:
    """The page. Everything that comes from outside is escaped."""
    template = _environment().get_template("profile.html.j2")
    return template.render(
        p=found,
        top=_heads(found),
        facts=facts(found),
        stripe=charts.stripe(found.kinds),
        sites=charts.sites(found),
        memory=charts.memory(found),
        alive=charts.alive(found.alive),
        tables=[("what", found.kinds, True), ("operator", found.ops, False)],
        trace=TRACE,
    )


def _environment() -> Environment:
    found = environment()
    report = found.loader
    assert isinstance(report, FileSystemLoader)
    found.loader = FileSystemLoader([str(Path(__file__).parent / "templates"), *report.searchpath])
    found.filters |= {
        "seconds": words.seconds,
        "scaled": words.scaled,
        "percent": words.percent,
        "kind": words.kind_name,
    }
    found.globals["colour"] = charts.colour
    return found


def _heads(found: Profile) -> list[tuple[str, str]]:
    """The numbers at the top of the page: value, and what it is."""
    sizes = [size for _, size in found.memory]
    heads = [
        (f"{found.lanes_a_second:.3g}", "lanes a second"),
        (words.percent(_of_ceiling(found)), "of the ceilings, in operators"),
        (words.percent(found.work.sharing), "of the work: what lanes need"),
        (words.seconds(found.host), "host overhead a step"),
    ]
    if sizes:
        heads.append((words.scaled(max(sizes), "B"), f"memory {found.memory_is}"))
    return heads


def _of_ceiling(found: Profile) -> float:
    """All operators' time at the ceilings by their own."""
    counted: tuple[Line, ...] = found.ops
    least = sum(line.seconds * (found.of_ceiling(line) or (0.0, ""))[0] for line in counted)
    return least / max(1e-12, sum(line.seconds for line in counted))
