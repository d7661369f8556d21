"""The report: one HTML file that needs no network and no script for the essentials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasttrace.errors import StoreError, UsageError
from fasttrace.report.pages import environment
from fasttrace.report.result import Result
from fasttrace.report.view import View, build_view
from fasttrace.store.disk import write_atomic
from fasttrace.store.manifest import Manifest
from fasttrace.store.store import merge, require

REPORT = "report.html"
EDITS = "edits"  # of a results directory: edits made after the trace


def write_report(out: Path | str, **options: Any) -> Path:
    """Merge the shards of `out` into its table and write `report.html` beside it; its path.

    `options` are those of `build_view`. Raises `StoreError` where the directory holds no rows, is
    damaged or can't be written.
    """
    out = Path(out)
    manifest = require(out)
    merge(out)
    path = out / REPORT
    edits = f"{EDITS}/{REPORT}" if (out / EDITS / REPORT).is_file() else None
    write_atomic(path, render(Result.open(out), manifest, edits=edits, **options).encode())
    return path


def render(result: Result, manifest: Manifest, *, edits: str | None = None, **options: Any) -> str:
    """The page; `edits` is where one about edits lies.

    Raises `StoreError` without rows, `UsageError` for an unknown metric.
    """
    if not result.rows:
        raise StoreError(
            "there are no finished rows to report yet. Run the trace again with the same command; "
            "it goes on where it stopped."
        )
    metric = options.get("metric")
    if metric is not None and metric not in result.metrics:
        raise UsageError(
            f"no row was scored with {metric!r}; the results hold {', '.join(result.metrics)}."
        )
    view = build_view(result, manifest, **options)
    template = environment().get_template("report.html.j2")
    return template.render(view=view, edits=edits, versions=_versions(view))


def _versions(view: View) -> list[str]:
    return [
        ", ".join(f"{name} {number}" for name, number in json.loads(text).items())
        for text in view.versions
    ]
