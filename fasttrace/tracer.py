"""The public face: plan a trace of a loaded pipeline, run it, hand rows and pictures back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fasttrace.plan.plan import Plan
from fasttrace.types import Corruption, Metric, Probe, Row, Site

if TYPE_CHECKING:
    import torch

    from fasttrace.report.result import Result

Pictures = dict[str, Any]  # name (no suffix) -> float tensor [3,H,W] in [0,1] on the CPU


class Tracer:
    """Traces any loaded diffusers pipeline of the Stable Diffusion families; leaves it as it was.

    `engine` is "reference" (diffusers modules and plain hooks). Raises `ModelError` where the
    pipeline can't be traced as it stands.
    """

    def __init__(self, pipe: Any, *, engine: str = "reference") -> None:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """What the model was loaded as: "embedded", a folder's name, a hub id."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """sha256 over configurations and weights; one changed weight changes it."""
        raise NotImplementedError

    def sites(self, component: str = "unet", sites: str | Sequence[str] = "paper") -> list[Site]:
        """Sites in execution order. `component` is "unet" or "text_encoder" (every encoder)."""
        raise NotImplementedError

    def plan(
        self,
        probes: Probe | Sequence[Probe],
        *,
        component: str = "unet",
        sites: str | Sequence[str] = "paper",
        tokens: str | Sequence[str | int] = "default",
        seeds: int | Sequence[int] = 1,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        corruption: Corruption | str | None = None,
        branch: str = "cond",
        window: tuple[int, int] | tuple[float, float] | Sequence[tuple[float, float]] | None = None,
        metric: str | Metric | Callable[..., Any] | Sequence[str | Metric] | None = None,
    ) -> Plan:
        """Everything the trace will ask, before anything heavy runs; `UsageError` on bad input.

        probes: the captions; their subjects must be in them.
        sites: "paper" (the default set), "all attn2" or "attn2" (a kind), names, aliases, globs.
        tokens: text-encoder tracing only: "default", or of "subject", "last subject", "later",
            "EOS", "padding", "earlier" and positions.
        seeds: a count (0 .. n-1) or the seeds themselves.
        steps, guidance, height, width, eta, generator, latents: as in the pipeline's own call;
            None takes the model's default.
        corruption: a record, or its kind's name.
        branch: "cond", "uncond" or "both".
        window: half-open range of denoiser calls, or fractions; a list asks every site in each.
        metric: a registered key ("clip_score", "picture_similarity", "latent_distance",
            "latent_recovery", "attribute", "clip:<folder or hub id>"), a record, a callable, several.
        """
        raise NotImplementedError

    def iter_rows(
        self,
        plan: Plan,
        *,
        done: Callable[[str], bool] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        pictures: bool = True,
    ) -> Iterator[tuple[Row, Pictures]]:
        """Run the plan and yield each row as soon as it is known, in the plan's order.

        `done(key)` true skips a row (a (probe, seed) whose rows are all done is not run at all).
        The dictionary holds the row's own picture under `row.picture`, and with the first row of
        each (probe, seed) also the clean and the corrupt picture, under the names that
        `fasttrace.types.pair_pictures(row)` gives. A row that needed no run points to the corrupt
        picture. With `pictures=False` it is empty and `row.picture` is None.
        `on_progress(done, total)` is called after every row, skipped ones included.
        """
        raise NotImplementedError

    def trace(
        self,
        prompt: str | Probe | Sequence[Probe],
        subject: str | None = None,
        *,
        negative_prompt: str = "",
        attribute: str = "",
        occurrence: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
        pictures: bool = True,
        **options: Any,
    ) -> Result:
        """Plan and run in one go: `tracer.trace("a photo of a dog", "dog", seeds=4).aie()`.

        `options` are those of `plan`. Returns one row per (probe, seed, site[, token, window]).
        """
        raise NotImplementedError

    def swap(
        self,
        prompt: str | Probe | Sequence[Probe],
        other_prompt: str,
        *,
        neighbours: int = 2,
        on_progress: Callable[[int, int], None] | None = None,
        pictures: bool = True,
        **options: Any,
    ) -> Result:
        """LocoGen's direct effect: the prompt everywhere, `other_prompt`'s K/V in m layers.

        One row per window of `neighbours` consecutive cross-attention layers (arXiv 2405.01008,
        section 4). Here the "corrupt" run of a row is the run with `other_prompt` everywhere.
        """
        raise NotImplementedError
