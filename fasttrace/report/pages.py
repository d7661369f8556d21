"""What every page is made with: the templates, and the colours they name."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fasttrace.report.charts import NEGATIVE, NEGATIVE_SHADES, SHADES, ramp


def environment() -> Environment:
    """Escapes everything; a name that a template misspells is an error."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = number
    found.globals["shades"] = shades()
    return found


def number(value: float) -> str:
    return f"{value:.3g}"


def shades() -> dict[str, list[tuple[str, str]]]:
    """Per theme the CSS class of each shade and its colour."""
    return {
        theme: [(f"p{i}", c) for i, c in enumerate(ramp(theme, SHADES))]
        + [(f"n{i}", c) for i, c in enumerate(ramp(theme, NEGATIVE_SHADES, NEGATIVE[theme]))]
        for theme in ("light", "dark")
    }
