"""The public face: plan a trace of a loaded pipeline, run it, hand rows and pictures back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrace.adapters.corruption import corrupt_text
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.text import Text
from fasttrace.engine.base import CLEAN, CORRUPT, Engine, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.options import Options
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.engine.sources import PROMPT, prompts_of
from fasttrace.engine.text_lanes import TextLanes
from fasttrace.errors import UsageError
from fasttrace.pictures import OUTPUTS, outputs
from fasttrace.plan.options import parse_choice
from fasttrace.plan.plan import Plan, PlannedRow
from fasttrace.planner import Planner
from fasttrace.report.names import WHOLE_STREAM
from fasttrace.rows import PairRows, Pictures, RowWriter, Scorer, lanes_of, rows_of_pairs
from fasttrace.types import Metric, Probe, Row

if TYPE_CHECKING:
    from fasttrace.attribution.estimators import Estimator
    from fasttrace.attribution.found import Found
    from fasttrace.attribution.kept import Kept
    from fasttrace.attribution.result import Screen
    from fasttrace.engine.predict import Prediction
    from fasttrace.plan.request import PlanRequest
    from fasttrace.report.result import Result

ENGINES: dict[str, Callable[..., Engine]] = {
    "reference": ReferenceEngine,
    "fast": FastEngine,
}

OnStep = Callable[[Any, int, Any, dict[str, Any]], Any]
OnStage = Callable[[str, int, int], None]

_PROBES_HAVE_THEIR_OWN = (
    "A probe has its own subject, attribute, occurrence and negative prompt: put them into the "
    "Probe, or give the prompt as text."
)


class Tracer(Planner):
    """Traces a loaded diffusers pipeline (Stable Diffusion, Kandinsky); leaves it as it was.

    `engine` is "fast" (many lanes in one compiled step) or "reference" (diffusers modules and plain
    hooks, one run after another: the definition). `options` are the fast engine's, the fields of
    `fasttrace.engine.options.Options`. Raises `ModelError` where the pipeline can't be traced as it
    stands.
    """

    def __init__(self, pipe: Any, *, engine: str = "fast", **options: Any) -> None:
        parse_choice(engine, tuple(ENGINES), "engine")
        super().__init__(Model(pipe), engine)
        if options and engine != "fast":
            raise UsageError(f"The reference engine takes no options ({', '.join(options)}).")
        for name in options:
            parse_choice(name, [f.name for f in fields(Options)], "option")
        self.engine = ENGINES[engine](self.model, **options)

    def iter_rows(
        self,
        plan: Plan,
        *,
        done: Callable[[str], bool] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        pictures: bool = True,
        callback_on_step_end: OnStep | None = None,
        output_type: str = "pt",
    ) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Run the plan and yield each row as soon as it is known.

        Pairs come in the plan's order, so many together as the engine takes; among those, rows come
        as their runs end.

        `done(key)` true skips a row (a (probe, seed) whose rows are all done is not run at all).
        The dictionary holds the row's own picture under `row.picture`, and with the first row of
        each (probe, seed) also the clean and the corrupt picture, under the names that
        `fasttrace.types.pair_pictures(row)` gives. A row that needed no run points to the corrupt
        picture. With `pictures=False` it is empty and `row.picture` is None.
        `on_progress(done, total)` is called after every row, skipped ones included.
        `callback_on_step_end(pipe, call, timestep, {"lanes": n})` is called after each denoiser
        call of a batch of n runs, clean and corrupt ones too; its answer is not read, and an error
        in it stops the trace. output_type: pictures as "pt" [3, H, W] in [0, 1], "np" [H, W, 3] or
        "pil".
        """
        parse_choice(output_type, OUTPUTS, "output_type")
        if plan.manifest["fingerprint"] != self.fingerprint:
            raise UsageError("The model's weights changed since the plan was made; plan again.")
        finished = 0
        groups = [
            list(group) for _, group in groupby(plan.rows, key=lambda row: (row.probe, row.seed))
        ]
        waiting: list[list[PlannedRow]] = []
        for number, rows in enumerate(groups, start=1):
            todo = [row for row in rows if done is None or not done(row.key)]
            finished += len(rows) - len(todo)
            if todo:
                waiting.append(todo)
            elif on_progress is not None:
                on_progress(finished, plan.total)
            if len(waiting) < self.engine.at_once and number < len(groups):
                continue
            rows_now = self._rows_of_pairs(plan, waiting, pictures, callback_on_step_end)
            for row, found in rows_now if waiting else ():
                finished += 1
                if on_progress is not None:
                    on_progress(finished, plan.total)
                yield row, outputs(found, output_type)
            waiting = []

    def plans(self, request: PlanRequest, folder: Path | str | None = None) -> list[Plan]:
        """Plans of a request, one a component; folder: where its tensor files lie."""
        from fasttrace.requested import plans_of

        if request.engine.name != self.engine.name:
            raise UsageError(
                f"The plan asks for the {request.engine.name} engine and this tracer has the "
                f"{self.engine.name} one: Tracer(pipe, engine={request.engine.name!r})."
            )
        return plans_of(self, request, None if folder is None else Path(folder))

    def run(
        self,
        asked: Plan | PlanRequest | Mapping[str, Any] | str | bytes,
        *,
        folder: Path | str | None = None,
        **options: Any,
    ) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Run a plan, or a request for one (a record, a mapping, JSON text), row by row.

        `options` are those of `iter_rows`, with which it answers; `on_progress` counts each
        component by itself. Everything is planned before the first row is asked for.
        """
        from fasttrace.plan.request import PlanRequest, parse_plan

        _check_names(options, self.iter_rows)
        if isinstance(asked, Plan):
            return self.iter_rows(asked, **options)
        request = asked if isinstance(asked, PlanRequest) else parse_plan(asked)
        plans = self.plans(request, folder)
        return chain.from_iterable(self.iter_rows(plan, **options) for plan in plans)

    def forecast(
        self, plan: Plan, options: Options | None = None, *, measure: bool = True
    ) -> Prediction:
        """FLOPs, memory and time of a plan on the fast engine; `measure` times a few calls.

        options: the engine's own where not given.
        """
        from fasttrace.forecast import forecast_plan

        if not isinstance(self.engine, FastEngine):
            return forecast_plan(self.model, plan, options, measure=measure)
        engine = self.engine
        return forecast_plan(
            self.model,
            plan,
            options or engine.options,
            measure=measure,
            trace=engine.denoiser,
            memory=engine.workshop.memory,
        )

    def trace(
        self,
        prompt: str | Probe | Sequence[Probe],
        subject: str | None = None,
        *,
        negative_prompt: str = "",
        attribute: str = "",
        occurrence: int = 0,
        until: str | None = None,
        budget: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        pictures: bool = True,
        **rest: Any,
    ) -> Result:
        """Plan and run in one go: `tracer.trace("a photo of a dog", "dog", seeds=4).aie()`.

        `rest` are the arguments of `plan`. One row per (probe, seed, site[, token, window]).

        until: "top10%@95" runs pairs in random order until the top tenth of the sites, over all
        pairs, is known with 95 % confidence ("top5@99": five, with 99 %); sites that are settled
        are left out of later pairs. The first metric decides. budget: with it, at most so many
        runs, clean and corrupt ones included. Rows are those of the exhaustive trace, at full
        fidelity, only fewer; `Result.until` says what was settled. `on_progress` is then given
        (rows so far, rows of the exhaustive trace).
        """
        _check_names(rest, self.trace, self.plan)
        probes = self._probes(prompt, subject, attribute, occurrence, negative_prompt)
        plan = self.plan(probes, **rest)
        return self._result(plan, on_progress, pictures, until, budget)

    def swap(
        self,
        prompt: str | Probe | Sequence[Probe],
        other_prompt: str,
        *,
        neighbours: int = 2,
        negative_prompt: str = "",
        attribute: str = "",
        subject: str = "",
        until: str | None = None,
        budget: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        pictures: bool = True,
        **rest: Any,
    ) -> Result:
        """LocoGen's direct effect: the prompt everywhere, `other_prompt`'s K/V in m layers.

        One row per window of `neighbours` consecutive cross-attention layers (arXiv 2405.01008,
        section 4). The "corrupt" run of a row has `other_prompt` everywhere; its effect is
        clean - score: what of the way from prompt to other prompt those layers carry.
        `rest` are the arguments of `plan_swap`; a metric may want the subject. until, budget: as in
        `trace`, for windows of layers.
        """
        _check_names(rest, self.swap, self.plan_swap)
        if isinstance(prompt, str):
            prompt = Probe(prompt, subject, attribute, negative_prompt=negative_prompt)
        elif subject or attribute or negative_prompt:
            raise UsageError(_PROBES_HAVE_THEIR_OWN)
        plan = self.plan_swap(prompt, other_prompt, neighbours=neighbours, **rest)
        return self._result(plan, on_progress, pictures, until, budget)

    def screen(
        self,
        prompt: str | Probe | Sequence[Probe],
        subject: str | None = None,
        *,
        by: str | Sequence[str] = "site",
        estimator: str | Estimator = "plain",
        metric: str | Metric | Callable[..., Any] = "latent_recovery",
        horizon: int | None = None,
        lanes: int | None = None,
        negative_prompt: str = "",
        attribute: str = "",
        occurrence: int = 0,
        keep: str | Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        **rest: Any,
    ) -> Screen:
        """What every patch would do, to first order, from one way back through the sampler.

        by: "site" (whole outputs), "head", "token" (a text token's key and value), "channel",
        "neuron" (of a feed-forward), "place", "text" (tokens of what the denoiser reads); several.
        Text-encoder sites come by token. estimator: "plain"; "nudged[:<strength>]", with a second
        slope where all that adds to the stream is patched a little; "averaged:<points>[:<rule>]"
        over prompts between corrupt and clean; "integrated:<points>" over the strength of each
        site's own patch; "joint:<points>" over that of all sites together; the first three also
        with "+keys" (swapped keys go through the softmax). metric: one that is differentiable.
        horizon: only so many calls answer to a patch, later predictions are held. lanes: runs that
        gradients are taken of at a time. keep: a folder where finished pairs are kept, so that the
        same call goes on there after a kill. on_progress is given (pairs done, pairs). `rest` are
        the arguments of `plan`. Raises `UsageError` where the metric isn't differentiable, or the
        scheduler is no weighted sum. A pair with nothing to restore has a `note` and takes no part
        in rankings.
        """
        from fasttrace.attribution.kept import keeping

        _check_names(rest, self.screen, self.plan)
        probes = self._probes(prompt, subject, attribute, occurrence, negative_prompt)
        plan = self.plan(probes, metric=metric, **rest)
        with keeping(keep) as kept:
            return self._screen(plan, by, estimator, horizon, lanes, kept, on_progress)

    def find(
        self,
        prompt: str | Probe | Sequence[Probe],
        subject: str | None = None,
        *,
        estimator: str | Estimator = "averaged:3",
        metric: str | Metric | Callable[..., Any] = "latent_recovery",
        top: int | None = None,
        audit: int = 10,
        threshold: float | None = None,
        always: str | Sequence[str] | None = WHOLE_STREAM,
        groups: int = 4,
        inside: int = 2,
        draw: int = 0,
        lanes: int | None = None,
        negative_prompt: str = "",
        attribute: str = "",
        occurrence: int = 0,
        keep: str | Path | None = None,
        on_progress: OnStage | None = None,
        **rest: Any,
    ) -> Found:
        """Which places matter, without patching all: screen, check exactly, bound what was missed.

        Screens every place (see `screen`), then patches exactly: kinds in `always`, the `top`
        ranked highest of the others (None: a fifth of them) and `audit` of the rest, drawn at
        random with the seed `draw`. From the latter follows how many places above `threshold` (the
        metric's unit; None: the effect of the last of the best tenth) may have been missed, at 95 %
        confidence. The best `groups` places are patched together, and `inside` heads and channels
        of each patched alone and together. lanes: as of `screen`. keep: a folder where all that is
        made is kept, so that the same call goes on there after a kill. on_progress is given
        ("pairs" or "rows", done, total). `rest` are the arguments of `plan`: one metric and window.
        """
        from fasttrace.attribution.find import Asked, find
        from fasttrace.attribution.kept import keeping
        from fasttrace.attribution.runner import Runner

        _check_names(rest, self.find, self.plan)
        always = (always,) if isinstance(always, str) else tuple(always or ())
        asked = Asked(top, audit, threshold, always, groups, inside, draw)
        probes = self._probes(prompt, subject, attribute, occurrence, negative_prompt)
        plan = self.plan(probes, metric=metric, **rest)
        asked.check(plan)
        told = None if on_progress is None else partial(on_progress, "pairs")
        levels = asked.levels(plan)
        with keeping(keep) as kept:
            screen = self._screen(plan, levels, estimator, None, lanes, kept, told)
            return find(plan, screen, Runner(self, plan, on_progress, kept), asked)

    def _screen(
        self,
        plan: Plan,
        by: str | Sequence[str],
        estimator: str | Estimator,
        horizon: int | None,
        lanes: int | None,
        kept: Kept | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> Screen:
        from fasttrace.attribution.estimators import parse_estimator
        from fasttrace.attribution.screen import LANES, Screener, pairs_of

        screener = Screener(
            self.model,
            self.fast_engine,
            plan,
            parse_estimator(estimator),
            by,
            horizon,
            LANES if lanes is None else lanes,
            kept,
        )
        pairs = pairs_of(plan, lambda probe, rows: self._pair(plan, probe, rows), self._inside)
        with self._inside():
            return screener.run(pairs, on_progress)

    @property
    def fast_engine(self) -> FastEngine:
        """What screens and parts of sites run on, whichever engine rows do."""
        return self.engine if isinstance(self.engine, FastEngine) else FastEngine(self.model)

    def _result(
        self,
        plan: Plan,
        on_progress: Callable[[int, int], None] | None,
        pictures: bool,
        until: str | None = None,
        budget: int | None = None,
    ) -> Result:
        from fasttrace.attribution.until import AdaptiveSweep, check_budget, run_adaptive
        from fasttrace.report.result import Result

        check_budget(budget, until)
        sweep = None if until is None else AdaptiveSweep(plan, until, budget)
        if sweep is None:
            found = self.iter_rows(plan, on_progress=on_progress, pictures=pictures)
        else:
            found = run_adaptive(sweep, lambda part: self.iter_rows(part, pictures=pictures))
        rows, kept = {}, {}
        for row, shown in found:
            rows[row.key] = row
            kept.update(shown)
            if sweep is not None and on_progress is not None:
                on_progress(len(rows), plan.total)
        ordered = [rows[key] for key in plan.keys if key in rows]
        return Result(ordered, kept, None if sweep is None else sweep.record)

    def _probes(
        self,
        prompt: str | Probe | Sequence[Probe],
        subject: str | None,
        attribute: str,
        occurrence: int,
        negative_prompt: str,
    ) -> Probe | Sequence[Probe]:
        if isinstance(prompt, str):
            if subject is None:
                raise UsageError("Name the subject: the words of the prompt to destroy.")
            return Probe(prompt, subject, attribute, occurrence, negative_prompt)
        if subject is not None or attribute or occurrence or negative_prompt:
            raise UsageError(_PROBES_HAVE_THEIR_OWN)
        return prompt

    def _rows_of_pairs(
        self,
        plan: Plan,
        planned: list[list[PlannedRow]],
        pictures: bool,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[Row, Pictures]]:
        """planned: the rows of each (probe, seed) that are run together."""
        floor: dict[str, float] = {}
        rows, pairs = [], []
        with self._inside():
            for own in planned:
                probe = plan.probes[own[0].probe]
                pairs.append(replace(self._pair(plan, probe, own), on_step=self._teller(on_step)))
                scorer = Scorer(self.model, plan.metrics, probe, floor)
                rows.append(PairRows(RowWriter(plan, scorer, pictures), own))
        return rows_of_pairs(self.model, rows, self.engine.run(pairs), self._inside)

    def _pair(self, plan: Plan, probe: Probe, planned: list[PlannedRow]) -> Pair:
        """Encode the texts of one (probe, seed)."""
        model = self.model
        start = model.start_of(plan.starts[planned[0].seed], probe.negative_prompt)
        guided = model.guided(plan.sampling)
        clean = model.text(probe.prompt, probe.negative_prompt, guided, start)
        if plan.other_prompt is not None:
            [corrupt] = model.encode([plan.other_prompt], clean)
        else:
            corrupt = corrupt_text(model, probe, plan.corruption, clean)
        lanes, of_text = lanes_of(planned), None
        others: dict[str, Text] = {}
        if plan.component == "text_encoder":
            of_text = TextLanes(
                model, probe, plan.corruption, clean, base=plan.base, tensors=plan.tensors
            ).texts
        else:
            for run in prompts_of(lanes):
                [others[run]] = model.encode([run.removeprefix(PROMPT)], clean)
        return Pair(
            texts={CLEAN: clean, CORRUPT: corrupt, **others},
            base=plan.base,
            start=start,
            sampling=plan.sampling,
            lanes=lanes,
            lane_texts=of_text,
            tensors=plan.tensors,
        )

    def _teller(self, on_step: OnStep | None) -> Callable[[int, Any, int], None] | None:
        if on_step is None:
            return None
        pipe = self.model.pipe
        return lambda call, timestep, lanes: on_step(pipe, call, timestep, {"lanes": lanes})

    def _inside(self) -> AbstractContextManager[None]:
        return scope(self.model.pipe)


def _check_names(given: Iterable[str], *takers: Callable[..., Any]) -> None:
    """Raise `UsageError` for a name that is no keyword of any of them."""
    taken = [p for taker in takers for p in inspect.signature(taker).parameters.values()]
    known = dict.fromkeys(p.name for p in taken if p.kind is p.KEYWORD_ONLY)
    for name in given:
        parse_choice(name, tuple(known), "argument")
