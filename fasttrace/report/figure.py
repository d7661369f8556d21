"""The heat map as a matplotlib figure, for notebooks and papers. Touches no global state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fasttrace.errors import StoreError, UsageError
from fasttrace.report.names import block, component_words, layer
from fasttrace.report.statistics import SiteEffect


def draw_heatmap(effects: list[SiteEffect], path: Path | None) -> Figure:
    """One panel a component: groups by execution order, or groups and layers by token.

    Colour is the normalised effect. Saved to `path` in the format of its suffix where given. Raises
    `UsageError` where there is nothing to draw, `StoreError` where `path` can't be written.
    """
    if not effects:
        raise UsageError("there are no rows to draw.")
    components = list(dict.fromkeys(e.component for e in effects))
    tables = [_matrix([e for e in effects if e.component == c]) for c in components]
    heights = [0.9 + 0.22 * len(rows) for _, rows, _ in tables]
    figure = Figure(figsize=(11, sum(heights) + 0.6 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for component, (values, rows, columns), axis in zip(components, tables, axes, strict=True):
        _panel(figure, axis, values, rows, columns)
        axis.set_title(
            f"{component_words(component)}: share of the total effect restored", loc="left"
        )
    if path is not None:
        try:
            figure.savefig(path, dpi=160)
        except (OSError, ValueError) as error:
            raise StoreError(f"the figure can't be written to {path} ({error}).") from error
    return figure


def _matrix(effects: list[SiteEffect]) -> tuple[np.ndarray, list[str], list[str]]:
    """Values with row and column names; NaN where nothing was run."""
    by_token = layer(effects[0].site) is not None
    cells: dict[tuple[str, str], float] = {}
    for e in effects:
        if by_token:
            row, column = f"{e.group}, layer {layer(e.site)} {e.kind}", e.selector
        else:
            row, column = e.group, e.site
        cells[row, column] = e.normalised if e.status == "run" else float("nan")
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in cells.items():
        values[rows.index(row), columns.index(column)] = value
    return values, rows, columns


def _panel(
    figure: Figure, axis: Axes, values: np.ndarray, rows: list[str], columns: list[str]
) -> None:
    finite = values[np.isfinite(values)]
    limit = max(float(np.abs(finite).max()), 1e-9) if finite.size else 1.0
    image = axis.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    blocks = [block(column) for column in columns]
    if any(blocks):
        starts = [i for i, name in enumerate(blocks) if i == 0 or name != blocks[i - 1]]
        axis.set_xticks(starts, [blocks[i] for i in starts], fontsize=7, ha="left")
        for start in starts[1:]:
            axis.axvline(start - 0.5, color="0.4", linewidth=0.6)
    else:
        axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=30, ha="right")
    figure.colorbar(image, ax=axis, pad=0.01)
