"""A plan from records: lanes of every (probe, seed), their keys, and the manifest."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from typing import Any

from fasttrace.adapters.fingerprint import canonical_json, digest, tensor_digest
from fasttrace.adapters.pipeline import Model, Start
from fasttrace.errors import UsageError
from fasttrace.plan.lanes import RUN, Planned
from fasttrace.plan.plan import Plan, PlannedRow
from fasttrace.types import Corruption, Lane, Metric, Probe, Sampling

MOST_ROWS = 5_000_000  # of one plan: several GB of records
KEY_VERSION = 1  # counts up when the same key would mean another score


@dataclass(frozen=True)
class Setting:
    """What all rows of one plan share."""

    model: str
    fingerprint: str
    engine: str
    dtype: str
    component: str
    corruption: str  # canonical JSON
    sampling: str  # canonical JSON of Sampling, the scheduler's class and configuration

    def pair(self, probe: Probe, start: Start) -> str:
        """Names the runs of one (probe, seed): equal for equal clean and corrupt pictures."""
        return digest([asdict(self) | {"component": ""}, asdict(probe), start_digest(start)])[:16]

    def key(self, probe: Probe, start: Start, lane: Lane, metric: Metric) -> str:
        """Content hash of everything that determines a row's score.

        Not of the device, nor of the versions of other software: those stand in the row.
        """
        return digest(
            [
                KEY_VERSION,
                asdict(self) | {"model": ""},
                asdict(probe),
                start_digest(start),
                lane_digest(lane),
                [metric.key, metric.fingerprint],
            ]
        )


def lane_digest(lane: Lane) -> str:
    """Hash of what a lane writes, and where."""
    return digest(
        [[p.site.name, *astuple(p.selector)[1:], p.source, p.strength] for p in lane.patches]
    )


def start_digest(start: Start) -> str:
    """Hash of the first latent and of the noise to come."""
    parts = [tensor_digest(start.latents)]
    if start.state is not None:
        parts.append(tensor_digest(start.state))
    return digest(parts)


def sampling_json(
    sampling: Sampling, scheduler: Any, facts: Mapping[str, Any] | None = None
) -> str:
    """Canonical JSON: the sampling, the scheduler's class, a hash of its configuration.

    facts: what else of a family decides a picture.
    """
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return canonical_json(
        asdict(sampling)
        | {"scheduler": type(scheduler).__name__, "scheduler_config": digest(config)[:12]}
        | dict(facts or {})
    )


def software() -> dict[str, str]:
    """Versions of what computed a row."""
    from fasttrace import __version__

    names = ("torch", "diffusers", "transformers")
    found = {name: version(name) for name in names}
    return found | {"fasttrace": __version__, "python": platform.python_version()}


def build_plan(
    model: Model,
    *,
    setting: Setting,
    probes: tuple[Probe, ...],
    starts: dict[int, Start],
    corruption: Corruption,
    sampling: Sampling,
    metrics: Sequence[Metric],
    calls: int,
    seeds_of: Callable[[Probe], Sequence[int]],
    lanes_of: Callable[[Probe], list[Planned]],
    extra: dict[str, Any],
    other_prompt: str | None = None,
    base: str = "corrupt",
    tensors: Mapping[str, Any] | None = None,
) -> Plan:
    """All rows in order; a row whose key came before is dropped and counted in the manifest."""
    rows: dict[str, PlannedRow] = {}
    asked = 0
    for i, probe in enumerate(probes):
        planned = lanes_of(probe)
        total = asked + len(planned) * len(metrics) * len(seeds_of(probe))
        if total > MOST_ROWS:
            raise UsageError(
                f"This plan has more than {MOST_ROWS} rows (prompts x seeds x sites x windows x "
                "metrics); split it."
            )
        for seed in seeds_of(probe):
            pair = setting.pair(probe, starts[seed])
            for lane, status in planned:
                run = lane_digest(lane)[:16] if status == RUN else base
                for metric in metrics:
                    key = setting.key(probe, starts[seed], lane, metric)
                    row = PlannedRow(
                        key, i, seed, lane, metric.key, status, picture=f"{pair}_{run}"
                    )
                    rows.setdefault(key, row)
                    asked += 1
    not_run = sum(r.status != "run" for r in rows.values())
    manifest = extra | {
        "model": setting.model,
        "fingerprint": setting.fingerprint,
        "engine": setting.engine,
        "dtype": setting.dtype,
        "device": str(model.device),
        "component": setting.component,
        "probes": [asdict(p) for p in probes],
        "seeds": list(starts),
        "starts": [start_digest(s) for s in starts.values()],
        "corruption": setting.corruption,
        "sampling": setting.sampling,
        "metrics": [[m.key, m.fingerprint] for m in metrics],
        "calls": calls,
        "rows": len(rows),
        "rows_without_a_run": not_run,
        "duplicates": asked - len(rows),
        "versions": software(),
    }
    return Plan(
        component=setting.component,
        probes=probes,
        seeds=tuple(starts),
        corruption=corruption,
        sampling=sampling,
        metrics=tuple(metrics),
        calls=calls,
        rows=tuple(rows.values()),
        manifest=manifest,
        starts=starts,
        other_prompt=other_prompt,
        base=base,
        tensors=tensors or {},
    )
