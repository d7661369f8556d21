"""What is said beforehand is what runs."""

from functools import cache

import pytest

from fasttrace import Tracer, forecast
from fasttrace.engine.options import Options
from fasttrace.errors import UsageError
from fasttrace.forecast import architecture, forecast_architecture
from fasttrace.types import Probe


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """An architecture takes seconds to compile, and nothing changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasttrace.forecast.architecture", cache(architecture))
        yield


PROBES = [Probe(f"a {word} dog", "dog") for word in ("red", "big", "old")]
EVERYTHING = Options(clean="cache", budget=1 << 50)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("lanes", [8, 48])
def test_flops_are_those_executed(tiny, component, lanes):
    options = {"lanes": lanes, "pairs": 2}
    tracer = Tracer(tiny, **options)
    plan = tracer.plan(
        PROBES, component=component, seeds=2, steps=3, guidance=3.0, metric="latent_recovery"
    )
    found = tracer.forecast(plan, Options(**options), measure=False)
    assert found.lanes == plan.lanes
    assert list(tracer.iter_rows(plan, pictures=False))
    assert tracer.engine.executed == found.flops >= found.useful_flops >= found.bound_flops


def test_time_comes_from_a_calibration(sd):
    tracer = Tracer(sd)
    plan = tracer.plan(PROBES[0], steps=2, metric="latent_recovery")
    assert tracer.forecast(plan, measure=False).seconds is None
    assert tracer.forecast(plan).seconds > 0


@pytest.mark.parametrize(
    ("name", "sites", "calls", "teraflop", "plain"),
    [("sd15", 70, 51, 0.803, 1.053), ("sdxl", 227, 50, 6.761, 1.032)],
)
def test_published_architectures(name, sites, calls, teraflop, plain):
    """The job of the README: 24 prompts, one seed, every paper site; within 3 % of the bound."""
    found = forecast_architecture(name, options=EVERYTHING)
    assert (found.calls, found.lanes, found.clean) == (calls, 24 * sites, "cache")
    assert found.useful_flops <= 1.03 * found.bound_flops
    assert found.flops <= 1.1 * found.useful_flops
    assert found.plain_flops / found.bound_flops == pytest.approx(plain, abs=0.001)
    _, denoiser = forecast.architecture(name)
    row = denoiser.cost.whole + denoiser.text_cost
    assert row == pytest.approx(teraflop * 1e12, rel=0.01)


@pytest.mark.parametrize("steps", [1, 4])
def test_few_calls(steps):
    """Nearly all of a run of few calls is shared."""
    found = forecast_architecture("sd15", steps=steps, options=EVERYTHING)
    assert found.useful_flops <= 1.05 * found.bound_flops
    assert found.plain_flops >= 1.1 * found.bound_flops


def test_a_small_budget_is_kept():
    for gib in (1, 20, 60):
        budget = gib * 2**30
        found = forecast_architecture("sd15", options=Options(budget=budget))
        assert found.cache_bytes <= budget
        assert found.peak_bytes < budget + 8 * 2**30


def test_a_device_gives_an_estimate():
    fast, slow = (forecast_architecture("sd15", device=name).seconds for name in ("H100", "T4"))
    assert 0 < fast < slow


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "sd9"}, "Unknown architecture 'sd9'"),
        ({"device": "Z80"}, "Unknown device 'Z80'; expected one of T4"),
        ({"prompts": 0}, "0 prompts were asked for"),
        ({"sites": "nowhere"}, "No site matches 'nowhere'"),
        ({"window": (0, 900)}, "outside the run"),
    ],
)
def test_wrong_calls(options, words):
    with pytest.raises(UsageError, match=words):
        forecast_architecture(**({"name": "sd15"} | options))
