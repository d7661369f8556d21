from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

FAKES = Path(__file__).parents[1] / "store" / "fake_rows.py"


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    name = "fasttrace_fake_rows"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FAKES)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def fake_tracer(monkeypatch, fakes):
    """The whole command with a tracer that needs no model; `.before_row` may do mischief."""
    import fasttrace
    from fasttrace.cli import demo, sweep
    from fasttrace.engine.predict import Prediction

    class FakeTracer:
        name = "fake"
        before_row = staticmethod(lambda number: None)
        sigma_of = staticmethod(lambda probes: 0.1 * len(probes))
        calls: list = []  # noqa: RUF012

        def __init__(self, pipe, *, engine="fast", **options):
            FakeTracer.calls.clear()

        def sites(self, component, sites):
            return []

        def plan(self, probes, *, component, seeds, corruption, metric, **options):
            FakeTracer.calls.append({"component": component, "corruption": corruption, **options})
            if corruption.sigma is None:
                corruption = replace(corruption, sigma=self.sigma_of(probes))
            rows = []
            for number, probe in enumerate(probes):
                for seed in seeds[probe]:
                    template = fakes.fake_sweep((("object"),), prompts=1, components=(component,))
                    for row in list(template)[:4]:
                        key = f"{component}{probe}{seed}{row.site}{row.selector}{corruption}"
                        rows.append(
                            SimpleNamespace(
                                key=f"{hash(key) & (2**64 - 1):016x}", probe=number, seed=seed,
                                row=replace(row, prompt=probe.prompt, subject=probe.subject,
                                            attribute=probe.attribute, seed=seed),
                            )
                        )  # fmt: skip
            return SimpleNamespace(
                component=component,
                probes=probes,
                corruption=corruption,
                calls=4,
                rows=rows,
                total=len(rows),
                manifest={
                    "fingerprint": "f" * 64,
                    "engine": "reference",
                    "dtype": "float32",
                    "sampling": f'{{"steps": {options.get("steps") or 50}}}',
                    "metrics": [[m, ""] for m in (metric or ["clip_score"])],
                    "versions": {"fasttrace": "0.1.0"},
                },
            )

        def forecast(self, plan):
            return Prediction(
                calls=4, lanes=plan.total, pairs=1, batches=1, largest_batch=48, flops=1010,
                useful_flops=1000, bound_flops=1000, plain_flops=1100, peak_bytes=2**20,
                cache_bytes=0, clean="leader", pruned_batches=0, shared_calls=0, seconds=60.0,
            )  # fmt: skip

        def iter_rows(self, plan, *, done, pictures):
            for number, planned in enumerate(plan.rows):
                if done(planned.key):
                    continue
                self.before_row(number)
                row = replace(planned.row, key=planned.key)
                yield row, fakes.fake_pictures(row) if pictures else {}

    monkeypatch.setattr(fasttrace, "Tracer", FakeTracer, raising=False)
    monkeypatch.setattr(fasttrace, "load", lambda name, **options: None, raising=False)
    monkeypatch.setattr(demo, "erase", lambda out, quiet: (out / "edits", []))
    monkeypatch.setattr(sweep, "quiet_libraries", lambda: None)
    return FakeTracer
