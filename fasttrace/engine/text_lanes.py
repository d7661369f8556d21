"""Text-encoder tracing: the corrupt encoding with one clean activation put back."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from fasttrace.adapters.corruption import corrupt_prompt, enter_corruption
from fasttrace.adapters.hooks import rewriting, watching, write_rows
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text, encode_cond
from fasttrace.errors import ModelError
from fasttrace.types import Corruption, Lane, Probe


class TextLanes:
    """Records the clean encoder run of one probe; `text(lane)` is a lane's own text.

    Activations [1, n, D] of every (layer, kind) are kept: a few megabytes for the largest encoder.
    """

    def __init__(self, model: Model, probe: Probe, corruption: Corruption, clean: Text) -> None:
        self.model, self.probe, self.corruption, self.clean = model, probe, corruption, clean
        self.modules = {n: m for e in model.encoders for n, m in e.modules().items()}
        self.recorded: dict[str, Tensor] = {}

        def keep(site: str, out: Tensor) -> None:
            self.recorded[site] = out.clone()

        with watching(self.modules, keep):
            encode_cond(model.pipe, probe.prompt, model.device)

    def text(self, lane: Lane) -> Text:
        """The corrupt prompt with the lane's patches. `ModelError` if one reached nothing."""
        written: Counter[str] = Counter()

        def write(site: str, out: Tensor) -> Tensor:
            new = out
            for patch in lane.patches:
                if patch.site.name == site:
                    new = write_rows(
                        new,
                        self.recorded[site] if patch.source == "clean" else out,
                        tokens=patch.selector.tokens,
                        strength=patch.strength,
                    )
                    written[site] += 1
            return new

        with ExitStack() as hooks:
            enter_corruption(hooks, self.model, self.probe, self.corruption)
            sites = {p.site.name: self.modules[p.site.name] for p in lane.patches}
            hooks.enter_context(rewriting(sites, write, first=True))
            prompt = corrupt_prompt(self.probe, self.corruption)
            cond, pooled = encode_cond(self.model.pipe, prompt, self.model.device)
        for patch in lane.patches:
            if not written[patch.site.name]:
                raise ModelError(
                    f"The patch at {patch.site.name} reached no tensor: the module was not called."
                )
        return replace(self.clean, cond=cond, pooled=pooled)
