"""What docs/backends.md promises to other tools: plans that stream, progress, pictures."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fasttrace
from fasttrace import Probe, Source, Tracer, parse_plan
from fasttrace.adapters.pipeline import Model
from fasttrace.errors import UsageError
from fasttrace.testing import tiny_pipeline

PROBE = Probe("a photo of a dog in the house", "dog")
SETTING: dict[str, Any] = {"steps": 3, "guidance": 3.0, "metric": "latent_distance"}
PLAN: dict[str, Any] = {
    "probes": [{"prompt": PROBE.prompt, "subject": "dog"}],
    "seeds": [0, 1],
    "sites": ["attn2"],
    "steps": 3,
    "guidance": 3.0,
    "metrics": ["latent_distance"],
}


def test_a_plan_streams_its_rows(sd):
    tracer = Tracer(sd)
    expected = tracer.trace([PROBE], sites="attn2", seeds=2, **SETTING).rows
    for asked in (PLAN, parse_plan(PLAN), parse_plan(PLAN).to_json()):
        rows = tracer.run(asked)
        first, pictures = next(rows)
        assert pictures[first.picture].shape == (3, 16, 16)
        found = {row.key: row.score for row in (first, *(row for row, _ in rows))}
        assert found == {row.key: row.score for row in expected}
    done = {expected[0].key}
    left = [row.key for row, _ in tracer.run(PLAN, done=lambda key: key in done, pictures=False)]
    assert set(left) == {row.key for row in expected} - done
    with pytest.raises(UsageError, match=r"Unknown argument 'don'.*'done'"):
        tracer.run(PLAN, don=None)


def test_several_components(sd):
    sites = ["attn2", "mlp"]
    plan = PLAN | {"components": ["unet", "text_encoder"], "sites": sites, "seeds": [0]}
    plans = Tracer(sd).plans(parse_plan(plan))
    assert [p.component for p in plans] == ["unet", "text_encoder"]
    assert plans[0].corruption == plans[1].corruption
    rows = [row for row, _ in Tracer(sd).run(plan, pictures=False)]
    assert {row.kind for row in rows} == {"attn2", "mlp"}
    with pytest.raises(UsageError, match="name nothing of text_encoder"):
        Tracer(sd).plans(parse_plan(plan | {"sites": ["attn2"]}))
    with pytest.raises(UsageError, match="No site matches 'atn2'"):
        Tracer(sd).plans(parse_plan(plan | {"sites": ["atn2"]}))


def test_what_a_plan_can_not_change(sd):
    with pytest.raises(UsageError, match="asks for float16, and .* float32"):
        Tracer(sd).run(PLAN | {"dtype": "float16"})
    with pytest.raises(UsageError, match="asks for the reference engine"):
        Tracer(sd).run(PLAN | {"engine": {"name": "reference"}})


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("scheduler", ["PNDM", "DDPM"])
def test_progress(engine, scheduler):
    """Each run of the sweep makes all of its calls, alone or in a batch."""
    from fasttrace.testing.tiny import make_scheduler

    pipe = tiny_pipeline("sd")
    pipe.scheduler = make_scheduler(scheduler)
    seen: list[tuple[int, int, int]] = []

    def see(given: Any, call: int, timestep: Any, about: dict[str, Any]) -> None:
        assert given is pipe
        seen.append((call, int(timestep), about["lanes"]))

    tracer = Tracer(pipe, engine=engine)
    plan = tracer.plan(PROBE, sites="attn2", **SETTING)
    rows = list(tracer.iter_rows(plan, callback_on_step_end=see))
    times = [int(t) for t in Model(pipe).scheduler(3).timesteps]
    assert all(times[call] == t for call, t, _ in seen)
    for call in range(len(times)):
        # The clean and the corrupt run, two copies, and the lanes; a batch may have more copies.
        assert sum(lanes for at, _, lanes in seen if at == call) >= 4 + len(rows)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_an_error_in_the_callback_stops_and_leaves_nothing(sd, engine):
    class StopError(Exception):
        pass

    def stop(_pipe: Any, call: int, _t: Any, _about: Any) -> None:
        if call == 2:
            raise StopError

    before = [len(m._forward_hooks) for m in sd.unet.modules()]
    tracer = Tracer(sd, engine=engine)
    plan = tracer.plan(PROBE, sites="attn2", **SETTING)
    with pytest.raises(StopError):
        list(tracer.iter_rows(plan, callback_on_step_end=stop))
    assert before == [len(m._forward_hooks) for m in sd.unet.modules()]
    assert len(list(tracer.iter_rows(plan))) == plan.total  # and it goes on


def test_pictures(sd):
    tracer = Tracer(sd)
    plan = tracer.plan(PROBE, sites="unet.mid_block.resnets.0", **SETTING)
    [(row, tensors)] = tracer.iter_rows(plan)
    [(_, arrays)] = tracer.iter_rows(plan, output_type="np")
    [(_, images)] = tracer.iter_rows(plan, output_type="pil")
    assert tensors.keys() == arrays.keys() == images.keys()
    assert len(tensors) == 3
    for name, tensor in tensors.items():
        assert np.array_equal(arrays[name], tensor.permute(1, 2, 0).numpy())
        assert isinstance(images[name], Image.Image)
        assert np.array_equal(np.asarray(images[name]), np.rint(arrays[name] * 255))
    with pytest.raises(UsageError, match="output_type 'latent'"):
        next(tracer.iter_rows(plan, output_type="latent"))
    assert row.picture in tensors


def test_generators_and_callables(sd):
    """Generator lists as in diffusers; a metric is any callable of the pictures."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    states = [generator.get_state() for generator in generators]
    rows = (
        Tracer(sd)
        .trace(
            PROBE,
            sites="attn2",
            generator=generators,
            source=["zero", Source("prompt", "a tiny cat")],
            base="clean",
            **{**SETTING, "metric": lambda pictures: pictures.mean((1, 2, 3))},
        )
        .rows
    )
    assert {row.seed for row in rows} == {3, 8}
    assert all(torch.equal(g.get_state(), s) for g, s in zip(generators, states, strict=True))


def test_the_users_weights_stay(sd):
    """The same tensors at the same addresses, in the dtype they had, through all of it."""
    weights = {n: p for part in (sd.unet, sd.vae) for n, p in part.named_parameters()}
    before = {name: (id(p), p.data_ptr(), p.dtype, p._version) for name, p in weights.items()}
    for _ in Tracer(sd).run(PLAN | {"sources": [{"kind": "zero"}]}):
        pass
    with fasttrace.record(sd, "attn2", dtype="bfloat16") as acts:
        acts.run(PROBE.prompt, seed=0, steps=2)
    weights = {n: p for part in (sd.unet, sd.vae) for n, p in part.named_parameters()}
    after = {name: (id(p), p.data_ptr(), p.dtype, p._version) for name, p in weights.items()}
    assert after == before
