"""Text-encoder tracing: the corrupt encoding with one clean activation put back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor

from fasttrace.adapters.corruption import corrupt_prompt, enter_corruption
from fasttrace.adapters.hooks import rewriting, watching, write_rows
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import Text
from fasttrace.engine.base import CORRUPT
from fasttrace.engine.sources import CLEAN, PROMPT, check_sources, prompts_of, run_of, written
from fasttrace.errors import ModelError
from fasttrace.types import Corruption, Lane, Patch, Probe


class TextLanes:
    """Records the clean encoder run of one probe; `texts(lanes)` are the lanes' own.

    base: the prompt that lanes read, "corrupt" or "clean". tensors: as `Pair.tensors`, of one call.
    Activations [1, n, D] of every (layer, kind) are kept, for each prompt that patches read: 40 MB
    for the largest encoder in 32 bits.
    """

    def __init__(
        self,
        model: Model,
        probe: Probe,
        corruption: Corruption,
        clean: Text,
        *,
        base: str = CORRUPT,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.probe, self.corruption, self.clean = model, probe, corruption, clean
        self.base, self.tensors = base, tensors or {}
        self.modules = {n: m for e in model.encoders for n, m in e.modules().items()}
        self.recorded: dict[str, dict[str, Tensor]] = {CLEAN: self._record(CLEAN)}

    def _record(self, run: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(site: str, out: Tensor) -> None:
            found[site] = out.clone()

        with ExitStack() as hooks:
            prompt = self.probe.prompt if run == CLEAN else run.removeprefix(PROMPT)
            if run == CORRUPT:
                enter_corruption(hooks, self.model, self.probe, self.corruption)
                prompt = corrupt_prompt(self.probe, self.corruption)
            hooks.enter_context(watching(self.modules, keep))
            self.model.family.read(prompt)
        return found

    def texts(self, lanes: Sequence[Lane]) -> list[Text]:
        """The corrupt prompt with each lane's patches: one pass of the encoder, a row a lane.

        Raises `ModelError` for a patch that reached nothing.
        """
        reached: Counter[str] = Counter()
        patches = [patch for lane in lanes for patch in lane.patches]
        runs = (CLEAN, CORRUPT, *prompts_of(lanes))
        check_sources(patches, self.tensors, 1, runs)
        for run in {run_of(patch.source) for patch in patches} - {None} - self.recorded.keys():
            self.recorded[str(run)] = self._record(str(run))
        wanted: dict[str, list[tuple[int, Patch]]] = {}
        for row, lane in enumerate(lanes):
            for patch in lane.patches:
                wanted.setdefault(patch.site.name, []).append((row, patch))

        def write(site: str, out: Tensor) -> Tensor:
            new = out
            for row, patch in wanted[site]:
                value, strength = written(
                    patch,
                    new[row : row + 1],
                    lambda run: self.recorded[run][site],
                    self.tensors,
                    0,
                )
                new = write_rows(
                    new,
                    value,
                    rows=slice(row, row + 1),
                    tokens=patch.selector.tokens,
                    strength=strength,
                )
            reached[site] += 1
            return new

        with ExitStack() as hooks:
            prompt = self.probe.prompt
            if self.base == CORRUPT:
                enter_corruption(hooks, self.model, self.probe, self.corruption)
                prompt = corrupt_prompt(self.probe, self.corruption)
            sites = {name: self.modules[name] for name in wanted}
            hooks.enter_context(rewriting(sites, write, first=True))
            texts = self.model.encode([prompt] * len(lanes), self.clean)
        for site in wanted:
            if not reached[site]:
                raise ModelError(
                    f"The patch at {site} reached no tensor: the module was not called."
                )
        return texts
