"""`Result`: the rows of a trace and everything that is asked of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fasttrace.errors import UsageError
from fasttrace.report.causal import CausalLabel, causal_set, fit_threshold
from fasttrace.report.names import components_in_order
from fasttrace.report.statistics import (
    Grouping,
    Scale,
    SiteEffect,
    average_effects,
    default_minimum,
    prompt_key,
)
from fasttrace.report.text import site_table, summary, top_table
from fasttrace.store.manifest import Call
from fasttrace.store.pictures import open_picture, to_image
from fasttrace.store.schema import FIELDS, rows_to_table
from fasttrace.store.settled import SettledRecord
from fasttrace.store.store import Store, read_rows, require
from fasttrace.types import Row, pair_pictures

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure


_log = logging.getLogger(__name__)
DEFAULT_TOP = 5


class SiteEffects(list[SiteEffect]):
    """A list that prints as a table."""

    def __repr__(self) -> str:
        return site_table(self) if self else "[]"


@dataclass(frozen=True)
class PairPictures:
    """One (probe, seed): clean, corrupt, and per component the best restored row."""

    prompt: str
    subject: str
    attribute: str
    seed: int
    clean_score: float
    corrupt_score: float
    clean: Image.Image | None
    corrupt: Image.Image | None
    best: dict[str, tuple[Row, Image.Image | None]]


class Result:
    """Rows of a trace, with their pictures.

    `pictures` is the store's picture folder, or a mapping of names to float pictures [3,H,W] in
    [0,1]. `until`: what an adaptive sweep settled, None where there was none. Its sites have run
    for unequal numbers of pairs, so averages of two of them compare other pairs; `until` has what
    was compared on the same ones.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        pictures: Mapping[str, Any] | Path | None = None,
        until: SettledRecord | None = None,
    ) -> None:
        self.rows: tuple[Row, ...] = tuple(rows)
        self.until = until
        self._pictures = pictures if pictures is not None else {}
        self._damaged: dict[str, str] = {}

    @classmethod
    def open(cls, directory: Path | str) -> Result:
        """The results in a directory. Raises `StoreError` where there are none, or damaged ones."""
        directory = Path(directory)
        require(directory)
        until = SettledRecord.read(directory)
        return cls(read_rows(directory), directory / "pictures", until)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def metrics(self) -> list[str]:
        """Metric keys in order of appearance."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    @property
    def components(self) -> list[str]:
        """Component names, the denoiser first."""
        return components_in_order(row.component for row in self.rows)

    @property
    def noise_floor(self) -> float:
        """The largest noise floor of any row, in the metric's unit."""
        return max((row.noise_floor for row in self.rows), default=0.0)

    @property
    def minimum(self) -> dict[str, float]:
        """Per metric, the total effect below which a pair is left out of the means by default."""
        return default_minimum(self.rows)

    def where(self, **values: Any) -> Result:
        """The rows whose columns have these values: `result.where(component="unet")`."""
        unknown = [name for name in values if name not in FIELDS]
        if unknown:
            raise UsageError(f"rows have no column {unknown[0]!r}.")
        kept = [r for r in self.rows if all(getattr(r, n) == v for n, v in values.items())]
        return Result(kept, self._pictures, self.until)

    def aie(self, by: str | Grouping = "attribute", *, minimum: float | None = None) -> SiteEffects:
        """Average indirect effects in execution order, a list for all groups of `by` in turn.

        by: "attribute", "prompt", "subject", "all", or a function from a row to a name. minimum:
        leave out pairs whose total effect is at or below it (metric's unit); None takes a tenth of
        the median total effect.
        """
        return SiteEffects(average_effects(self.rows, by=by, minimum=minimum))

    def causal(
        self,
        threshold: float | None = None,
        top: int | None = None,
        validation: Sequence[CausalLabel] | None = None,
        *,
        by: str | Grouping = "attribute",
        scale: Scale = "effect",
        minimum: float | None = None,
    ) -> SiteEffects:
        """The causal sites of each group and component, largest normalised effect first; five by
        default.

        threshold: at least this value on `scale` ("score", "effect", "normalised"). top: at most so
        many. validation: a labelled set the threshold is fitted on. Sites at or below the noise
        floor never count; `SiteEffect.p_holm` says which would pass by chance.
        """
        if validation is not None:
            if threshold is not None:
                raise UsageError("give a threshold or a validation set, not both.")
            threshold = fit_threshold(self.rows, validation, scale)
        if threshold is None and top is None:
            top = DEFAULT_TOP
        effects = self.aie(by, minimum=minimum)
        return SiteEffects(causal_set(effects, threshold=threshold, top=top, scale=scale))

    def heatmap(self, path: Path | str | None = None, *, by: str = "attribute") -> Figure:
        """A matplotlib figure: sites in execution order by group, text encoders layer by token."""
        from fasttrace.report.figure import draw_heatmap

        return draw_heatmap(self.aie(by), None if path is None else Path(path))

    def picture(self, name: str | None) -> Image.Image | None:
        """A picture by its name; None where it was not kept or is damaged."""
        if name is None:
            return None
        if isinstance(self._pictures, Path):
            return open_picture(self._pictures, name, self._damaged)
        kept = self._pictures.get(name)
        return None if kept is None else to_image(kept).convert("RGB")

    def warn_of_damage(self) -> None:
        """One warning for all damaged pictures met so far, however many."""
        if self._damaged:
            first = next(iter(self._damaged.values()))
            _log.warning("going on without %d damaged pictures; one: %s", len(self._damaged), first)
            self._damaged.clear()

    def pictures(self, limit: int | None = None) -> list[PairPictures]:
        """Clean, corrupt and best restored pictures of each (probe, seed), in the rows' order."""
        found = []
        for pair in list(self.pairs().values())[:limit]:
            first, best = pair[0], {}
            for component in components_in_order(row.component for row in pair):
                run = [r for r in pair if r.component == component and r.status == "run"]
                # One metric: scores of different ones can't be compared.
                run = [r for r in run if r.metric == first.metric]
                if run:
                    row = max(run, key=lambda r: r.effect)
                    best[component] = (row, self.picture(row.picture))
            names = pair_pictures(first) or (None, None)
            found.append(
                PairPictures(
                    first.prompt,
                    first.subject,
                    first.attribute,
                    first.seed,
                    first.clean_score,
                    first.corrupt_score,
                    self.picture(names[0]),
                    self.picture(names[1]),
                    best,
                )
            )
        self.warn_of_damage()
        return found

    def pairs(self) -> dict[tuple[Any, ...], list[Row]]:
        """Rows by (probe, seed)."""
        pairs: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            pairs.setdefault((*prompt_key(row), row.seed), []).append(row)
        return pairs

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table with the documented schema (`fasttrace.store.COLUMNS`)."""
        return rows_to_table(self.rows)

    def save(self, directory: Path | str) -> Path:
        """Write a results directory that `Result.open` and `fasttrace report` read.

        Raises `StoreError` where the directory belongs to something else or holds other results.
        """
        if not self.rows:
            raise UsageError("there are no rows to save.")
        fixed: dict[str, Any] = {"saved_from": "python", "metrics": sorted(self.metrics)}
        fixed |= {
            name: sorted({getattr(row, name) for row in self.rows})
            for name in ("fingerprint", "corruption", "sampling", "branch", "engine")
        }
        versions = json.loads(self.rows[0].versions)
        call = Call.now("Result.save (from Python)", planned=len(self.rows), versions=versions)
        with Store.open(directory, fixed=fixed, call=call) as store:
            for row in self.rows:
                store.add(row, self._kept(row))
            store.finish()
            if self.until is not None:
                self.until.write(Path(directory))
        self.warn_of_damage()
        return Path(directory)

    def _kept(self, row: Row) -> dict[str, Any]:
        if row.picture is None:
            return {}
        kept = {}
        for name in (row.picture, *(pair_pictures(row) or ())):
            image = self.picture(name)
            if image is not None:
                kept[name] = np.asarray(image, np.float32).transpose(2, 0, 1) / 255.0
        return kept

    def __repr__(self) -> str:
        if not self.rows:
            return "Result: no rows" + (f"\n{self.until.words}" if self.until else "")
        return f"Result: {summary(self)}\n{top_table(self, self.causal(top=3))}"
