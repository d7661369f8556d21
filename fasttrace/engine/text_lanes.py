"""Text-encoder tracing: the corrupt encoding with one clean activation put back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from fasttrace.adapters.corruption import corrupt_prompt, enter_corruption
from fasttrace.adapters.hooks import rewriting, watching, write_rows
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text, encode_cond
from fasttrace.errors import ModelError
from fasttrace.types import Corruption, Lane, Patch, Probe


class TextLanes:
    """Records the clean encoder run of one probe; `texts(lanes)` are the lanes' own.

    Activations [1, n, D] of every (layer, kind) are kept: 40 MB for the largest encoder in 32 bits.
    """

    def __init__(self, model: Model, probe: Probe, corruption: Corruption, clean: Text) -> None:
        self.model, self.probe, self.corruption, self.clean = model, probe, corruption, clean
        self.modules = {n: m for e in model.encoders for n, m in e.modules().items()}
        self.recorded: dict[str, Tensor] = {}

        def keep(site: str, out: Tensor) -> None:
            self.recorded[site] = out.clone()

        with watching(self.modules, keep):
            encode_cond(model.pipe, probe.prompt, model.device)

    def texts(self, lanes: Sequence[Lane]) -> list[Text]:
        """The corrupt prompt with each lane's patches: one pass of the encoder, a row a lane.

        Raises `ModelError` for a patch that reached nothing.
        """
        written: Counter[str] = Counter()
        wanted: dict[str, list[tuple[int, Patch]]] = {}
        for row, lane in enumerate(lanes):
            for patch in lane.patches:
                wanted.setdefault(patch.site.name, []).append((row, patch))

        def write(site: str, out: Tensor) -> Tensor:
            new = out
            for row, patch in wanted[site]:
                new = write_rows(
                    new,
                    self.recorded[site] if patch.source == "clean" else out[row : row + 1],
                    rows=slice(row, row + 1),
                    tokens=patch.selector.tokens,
                    strength=patch.strength,
                )
            written[site] += 1
            return new

        with ExitStack() as hooks:
            enter_corruption(hooks, self.model, self.probe, self.corruption)
            sites = {name: self.modules[name] for name in wanted}
            hooks.enter_context(rewriting(sites, write, first=True))
            prompt = corrupt_prompt(self.probe, self.corruption)
            cond, pooled = encode_cond(self.model.pipe, [prompt] * len(lanes), self.model.device)
        for site in wanted:
            if not written[site]:
                raise ModelError(
                    f"The patch at {site} reached no tensor: the module was not called."
                )
        return [
            replace(
                self.clean,
                cond=cond[i : i + 1],
                pooled=None if pooled is None else pooled[i : i + 1],
            )
            for i in range(len(lanes))
        ]
