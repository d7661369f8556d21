"""Activations of plain generations, per denoiser call: in memory, or as a data set on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrace.adapters.fingerprint import digest
from fasttrace.adapters.hooks import watching
from fasttrace.adapters.load import parse_dtype
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.selection import select_sites
from fasttrace.engine.base import CLEAN, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.recording import RecordingJob, recording_job
from fasttrace.errors import UsageError
from fasttrace.pictures import as_output
from fasttrace.plan import options
from fasttrace.plan.build import sampling_json, start_digest
from fasttrace.plan.windows import resolve_window
from fasttrace.planner import Planner
from fasttrace.rows import decode_in_parts
from fasttrace.store.activations import Writer, sample_bytes
from fasttrace.types import Probe, Sampling, Site

BRANCHES = {"cond": ("cond",), "uncond": ("uncond",), "both": ("uncond", "cond")}
OnStep = Callable[[Any, int, Any, dict[str, Any]], Any]


@dataclass(frozen=True)
class Recorded:
    """One run: `recorded["unet...attn2"]` is [calls, ...], of a text encoder's site [n, D].

    With branch "both" there is an axis of 2 behind the calls: unconditional, conditional.
    """

    prompt: str
    seed: int
    activations: dict[str, Tensor] = field(repr=False)
    latents: Tensor = field(repr=False)  # [1, C, h, w]
    _draw: Callable[[Tensor], Tensor] = field(repr=False)

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.activations:
            raise UsageError(f"{site!r} was not recorded; {', '.join(self.activations)} were.")
        return self.activations[site]

    def picture(self, output_type: str = "pil") -> Any:
        """The run's picture; "pt" [3, H, W] in [0, 1], "np" [H, W, 3] or "pil"."""
        return as_output(self._draw(self.latents)[0].cpu(), output_type)


@dataclass
class Acts:
    """What `fasttrace.record` gives: `run` makes runs and hands their activations over."""

    model: Model
    engine: FastEngine
    asked: str | Sequence[str]
    tokens: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    branch: str
    window: Any
    dtype: torch.dtype | None
    out: Path | None
    shard_bytes: int
    _planner: Planner = field(init=False)
    _writer: Writer | None = None
    _open: bool = True

    def __post_init__(self) -> None:
        self._planner = Planner(self.model, "fast")

    def run(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: OnStep | None = None,
    ) -> Any:
        """Generate every prompt with every seed, in batches, and record.

        A prompt and a seed give a `Recorded`, lists of them a list, prompt by prompt. Where the
        recording goes to disk, None comes back, and runs that are there already are not made again.
        callback_on_step_end(pipe, call, timestep, {"lanes": n}): after each denoiser call of a
        batch; what it returns is not read. The other arguments are the pipeline's own.
        """
        if not self._open:
            raise UsageError("The recording has ended: call run inside the with block.")
        many = [prompts] if isinstance(prompts, str) else prompts
        if not (isinstance(many, Sequence) and many) or not all(isinstance(p, str) for p in many):
            raise UsageError(f"A prompt is text, or several are a list; {prompts!r} was given.")
        for prompt in (*many, negative_prompt):
            options.check_text(self.model, Probe(prompt, ""), with_subject=False)
        sampling = options.parse_sampling(
            self.model, steps=steps, guidance=guidance, height=height, width=width, eta=eta
        )
        seeds = [seed] if isinstance(seed, int) else seed
        starts, _ = self._planner._starts(sampling, seeds, generator, latents)
        branches = BRANCHES[options.parse_branch(self.branch, self.model.guided(sampling))]
        with scope(self.model.pipe):
            pairs = [
                (prompt, number, self._pair(prompt, negative_prompt, sampling, starts[number]))
                for prompt in many
                for number in starts
            ]
            found = list(
                self._runs(pairs, sampling, branches, negative_prompt, callback_on_step_end)
            )
        if self.out is not None:
            return None
        lists = any(isinstance(given, Sequence) for given in (seed, generator))
        alone = isinstance(prompts, str) and len(starts) == 1 and not lists
        return found[0] if alone else found

    def sites(self, height: int | None = None, width: int | None = None) -> list[Site]:
        """What is recorded, in execution order; text encoders' sites last."""
        sampling = options.parse_sampling(
            self.model, steps=None, guidance=None, height=height, width=width, eta=0.0
        )
        with scope(self.model.pipe):
            pair = self._pair("", "", sampling, self.model.start(sampling, 0))
            return self._sites(recording_job(self.engine.workshop, [pair]))

    # ---- inside

    def _pair(self, prompt: str, negative: str, sampling: Sampling, start: Any) -> Pair:
        start = self.model.start_of(start, negative)
        text = self.model.text(prompt, negative, self.model.guided(sampling), start)
        return Pair({CLEAN: text}, CLEAN, start, sampling, ())

    def _sites(self, job: RecordingJob) -> list[Site]:
        sampling = job.sampling
        layout = self.model.sites(sampling.height, sampling.width)
        shapes = job.recordable()
        known = [site for site in layout.every if site.name in shapes]
        finer = [
            Site(mark.name, mark.kind, "unet", len(known) + i, mark.shape)
            for i, mark in enumerate(job.denoiser.body.small.marks)
            if mark.kind in ("heads", "hidden", "skip")
        ]
        texts = [s for encoder in self.model.encoders for s in encoder.sites()]
        # A word such as "attn2" or "paper" means sites of the denoiser; finer places and the text
        # encoders' sites are named one by one, or by a glob of their full names.
        words = [self.asked] if isinstance(self.asked, str) else list(self.asked)
        if not words:
            raise UsageError("The list of sites is empty; give 'paper', a kind, or names of sites.")
        chosen: dict[str, Site] = {}
        for word in words:
            try:
                found = select_sites(known, word)
            except UsageError:
                found = select_sites([*known, *finer, *texts], word)
            chosen |= {site.name: site for site in found}
        order = [s for s in (*known, *finer, *texts) if s.name in chosen]
        for site in order:
            self._check_slices(site, job)
        return order

    def _check_slices(self, site: Site, job: RecordingJob) -> None:
        if self.tokens is not None:
            if len(site.shape) != 2:
                raise UsageError(
                    f"{site.name} has rows of shape {list(site.shape)}, no tokens: tokens= is for "
                    "sites [N, C]."
                )
            if not all(0 <= token < site.shape[0] for token in self.tokens):
                raise UsageError(f"{site.name} has tokens 0 to {site.shape[0] - 1}.")
        if self.heads is not None:
            mark = job.denoiser.marks.get(site.name)
            if mark is None or mark.kind != "heads":
                raise UsageError(
                    f"{site.name} has no heads: heads= is for '<attention>.heads', their outputs "
                    "before the output projection."
                )
            if not all(0 <= head < mark.heads for head in self.heads):
                raise UsageError(f"{site.name} has heads 0 to {mark.heads - 1}.")

    def _sliced(self, job: RecordingJob, site: str, value: Tensor) -> Tensor:
        """value [..., N, C] or [..., C, h, w]: a copy of what is asked of it, on the CPU."""
        if self.tokens is not None:
            value = value[..., list(self.tokens), :]
        if self.heads is not None:
            split = value.unflatten(-1, (job.denoiser.marks[site].heads, -1))
            value = split[..., list(self.heads), :]
        kept = value.to("cpu", self.dtype or value.dtype, copy=True)
        return kept.contiguous()

    def _runs(
        self,
        pairs: Sequence[tuple[str, int, Pair]],
        sampling: Sampling,
        branches: tuple[str, ...],
        negative: str,
        on_step: OnStep | None,
    ) -> Iterator[Recorded]:
        """Every run; where a writer takes them nothing is handed out."""
        first = recording_job(self.engine.workshop, [pairs[0][2]])
        sites = self._sites(first)
        window = (
            (0, first.calls) if self.window is None else resolve_window(self.window, first.calls)
        )
        keys = [""] * len(pairs)
        if self.out is not None:
            writer = self._writer = self._writer or self._make_writer(
                first, sites, branches, window
            )
            about = sampling_json(
                sampling, self.model.pipe.scheduler, self.model.family.sampling_facts()
            )
            keys = [
                digest([prompt, negative, about, start_digest(pair.start)])
                for prompt, _, pair in pairs
            ]
            left = [(k, p) for k, p in zip(keys, pairs, strict=True) if not writer.done(k)]
        else:
            left = list(zip(keys, pairs, strict=True))
        most = self._at_once(first, sites, branches, window)
        while left:
            part = left[:most]
            job = recording_job(self.engine.workshop, [pair for _, (_, _, pair) in part])
            part = part[: len(job.pairs)]
            left = left[len(part) :]
            found = self._batch(job, sites, branches, window, [p[0] for _, p in part], on_step)
            for (key, (prompt, number, _)), run in zip(part, found, strict=True):
                run = replace(run, seed=number)
                if self._writer is None:
                    yield run
                    continue
                facts = {"prompt": prompt, "negative_prompt": negative, "seed": number}
                self._writer.add(key, facts | {"sampling": about}, run.activations)

    def _batch(
        self,
        job: RecordingJob,
        sites: Sequence[Site],
        branches: tuple[str, ...],
        window: tuple[int, int],
        prompts: Sequence[str],
        on_step: OnStep | None,
    ) -> list[Recorded]:
        of_unet = [site.name for site in sites if site.component == "unet"]
        kept: dict[str, list[Tensor]] = {name: [] for name in of_unet}

        def see(call: int, activations: Any) -> None:
            if window[0] <= call < window[1]:
                for name, value in activations.items():
                    kept[name].append(self._sliced(job, name, value))
            if on_step is not None:
                on_step(
                    self.model.pipe, call, job.schedule.timesteps[call], {"lanes": len(prompts)}
                )

        latents = job.record(of_unet, branches, see)
        runs = []
        for lane, prompt in enumerate(prompts):
            found = {
                name: torch.stack([v[lane] if len(branches) > 1 else v[lane, 0] for v in values])
                for name, values in kept.items()
            }
            found |= self._of_text(job, [s for s in sites if s.component != "unet"], prompt)
            runs.append(
                Recorded(
                    prompt,
                    0,
                    found,
                    latents[lane : lane + 1],
                    lambda x: decode_in_scope(self.model, x, job.sampling),
                )
            )
        return runs

    def _of_text(self, job: RecordingJob, sites: Sequence[Site], prompt: str) -> dict[str, Tensor]:
        if not sites:
            return {}
        modules = {n: m for e in self.model.encoders for n, m in e.modules().items()}
        found: dict[str, Tensor] = {}

        def keep(site: str, out: Tensor) -> None:
            found[site] = self._sliced(job, site, out[0])

        with watching({site.name: modules[site.name] for site in sites}, keep):
            self.model.family.read(prompt)
        return found

    def _shapes(
        self,
        job: RecordingJob,
        sites: Sequence[Site],
        branches: Sequence[str],
        window: tuple[int, int],
    ) -> dict[str, tuple[int, ...]]:
        found = {}
        for site in sites:
            one = self._sliced(job, site.name, torch.empty(site.shape))
            lead: tuple[int, ...] = ()
            if site.component == "unet":
                lead = (window[1] - window[0], *((2,) if len(branches) > 1 else ()))
            found[site.name] = (*lead, *one.shape)
        return found

    def _at_once(
        self,
        job: RecordingJob,
        sites: Sequence[Site],
        branches: Sequence[str],
        window: tuple[int, int],
    ) -> int:
        """Runs in a batch: on their way to the disk they take no more than a shard."""
        if self.out is None:
            return self.engine.options.lanes
        each = sample_bytes(self._shapes(job, sites, branches, window), self._kept_as())
        return max(1, min(self.engine.options.lanes, self.shard_bytes // max(1, each)))

    def _kept_as(self) -> torch.dtype:
        return self.dtype or self.model.dtype

    def _make_writer(
        self,
        job: RecordingJob,
        sites: Sequence[Site],
        branches: Sequence[str],
        window: tuple[int, int],
    ) -> Writer:
        assert self.out is not None
        fixed = {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint(),
            "sites": {n: list(s) for n, s in self._shapes(job, sites, branches, window).items()},
            "tokens": None if self.tokens is None else list(self.tokens),
            "heads": None if self.heads is None else list(self.heads),
            "branches": list(branches),
            "window": list(window),
            "dtype": str(self._kept_as()).removeprefix("torch."),
            "computed_in": str(self.model.dtype).removeprefix("torch."),
        }
        return Writer.open(self.out, fixed, self.shard_bytes)

    def close(self) -> None:
        """What waits is written; nothing can be run any more."""
        self._open = False
        if self._writer is not None:
            self._writer.close()
        self.engine.workshop.forget()


def decode_in_scope(model: Model, latents: Tensor, sampling: Sampling) -> Tensor:
    with scope(model.pipe):
        return decode_in_parts(model, latents, sampling)


@contextmanager
def record(
    pipe: Any,
    sites: str | Sequence[str],
    *,
    tokens: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    branch: str = "cond",
    window: Any = None,
    dtype: str | torch.dtype | None = None,
    out: Path | str | None = None,
    shard_bytes: int = 256 << 20,
    **engine: Any,
) -> Iterator[Acts]:
    """Record activations of a pipeline: `with fasttrace.record(pipe, ["attn2"]) as acts: ...`.

    sites: diffusers module paths ("unet.mid_block.attentions.0.transformer_blocks.0.attn2"), the
        paper's aliases, kinds, globs; also "<attention>.heads" (before the output projection),
        "<ff>.hidden" (neurons), "<up block>.skips.<i>", and text encoders' sites.
    tokens: positions of sites [N, C]. heads: of "<attention>.heads" sites, then [N, heads, D].
    branch: "cond", "uncond" or "both". window: denoiser calls, or fractions, as in `Tracer.plan`.
    dtype: what is kept is converted to it; None is the model's own. The weights stay as they are.
    out: a directory for safetensors shards of about `shard_bytes`, read by `fasttrace.Activations`;
        it is extended by later recordings of the same kind, also after a kill.
    engine: options of the fast engine, such as `lanes`.

    Values are those of a plain forward hook on the module, up to rounding: another batch size sums
    in another order. Nothing stays in the pipeline. Raises as `Tracer` and the store do.
    """
    if branch not in BRANCHES:
        options.parse_choice(branch, tuple(BRANCHES), "branch")
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise UsageError(f"shard_bytes is a whole number of 1 or more, not {shard_bytes!r}.")
    tokens, heads = _positions("tokens", tokens), _positions("heads", heads)
    model = Model(pipe)
    acts = Acts(
        model,
        FastEngine(model, **engine),
        sites,
        tokens,
        heads,
        branch,
        window,
        None if dtype is None else parse_dtype(dtype),
        None if out is None else Path(out),
        shard_bytes,
    )
    try:
        yield acts
    finally:
        acts.close()


def _positions(name: str, given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    found = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if not found or any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise UsageError(f"{name} is a list of whole numbers, such as [0, 3], not {given!r}.")
    return found
