"""The call in which lanes open, shared up to the place where each begins to differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fasttrace.engine.compiled import Denoiser, Tables
from fasttrace.engine.flops import count
from fasttrace.engine.graph.fuse import fuse_attention
from fasttrace.engine.graph.stairs import stairs
from fasttrace.engine.schedule import Schedule
from fasttrace.engine.work import Stairs
from fasttrace_kernels import guided_step_


class FirstCall:
    """Conditional rows of one pair: `first` from the start, `joins[site]` more at each site.

    Row 0 is the clean run, row 1 the corrupt one. The unconditional rows are the trunk's, since at
    this call every lane has the latent of its base run.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tables: Tables,
        first: int,
        joins: Mapping[str, int],
        dtype: torch.dtype,
        fused: bool = False,
    ) -> None:
        self.denoiser, self.tables, self.first, self.joins = denoiser, tables, first, dict(joins)
        graph = stairs(denoiser.body, first, joins)
        self.graph = fuse_attention(graph) if fused else graph
        self.rows = first + sum(joins.values())
        self.flops = count(self.graph)
        self.dtype = dtype
        # The corrupt copies that join with the first and with the last site, where any joins.
        self.copy_rows = (1, self.rows - 1)
        if joins:
            early = first + next(iter(joins.values())) - 1
            self.copy_rows = (early - (len(joins) == 1), self.rows - 1)

    def lane_rows(self, stairs: Stairs) -> list[int]:
        """Rows of the joining lanes, site by site, then of the others."""
        at, found = self.first, list[int]()
        for site, lanes in stairs.joining:
            found += range(at, at + len(lanes))
            at += self.joins[site]
        return found + list(range(2, 2 + len(stairs.whole)))

    def run(
        self,
        call: int,
        state: Tensor,
        slots: Sequence[int],
        parent: int,
        patched: Mapping[int, int],
        uncond: Tensor | None,
        guidance: float,
        schedule: Schedule,
        noise: Tensor | None,
    ) -> Tensor:
        """The rows' state [kept, rows, C, h, w] after the call, from that before it.

        slots: the text each row reads. parent: the row that joining ones copy. patched: row -> the
        row whose activation it takes, at the site it joins at. uncond [rows, C, h, w].
        """
        device = self.tables.device
        texts = torch.tensor(slots, device=device)
        scale = schedule.input_scales[call].item()
        values: dict[str, Tensor] = {
            **self.denoiser.weights,
            **self.tables.text,
            **self.tables.step,
            "sample": (state[0, : self.first] * scale).to(self.dtype),
            "step_row": self.tables.rows(call, texts),
        }
        values |= {name: texts for name in self.graph.reads if name.startswith("slot:")}
        at = self.first
        for site, count_of in self.joins.items():
            index = torch.full((self.rows,), -1, dtype=torch.int64)
            for row in range(at, at + count_of):
                index[row] = patched.get(row, -1)
            at += count_of
            values[f"{site}/index"] = index.to(device)
            values[f"{site}/strength"] = torch.ones(self.rows, device=device)
            values[f"{site}/parents"] = torch.full((count_of,), parent, device=device)
        prediction = self.graph(values)["prediction"]
        if uncond is not None:
            prediction = torch.cat([uncond, prediction])
        weight = torch.float64 if device.type == "cpu" else torch.float32
        after = state.clone()
        guided_step_(
            prediction,
            after,
            torch.empty_like(prediction),
            torch.tensor([call, 0], device=device),
            schedule.weights.to(device, weight),
            schedule.input_scales.to(device, weight),
            None if uncond is None else torch.full((1,), guidance, dtype=weight, device=device),
            noise,
            schedule.slots.latents,
        )
        return after
