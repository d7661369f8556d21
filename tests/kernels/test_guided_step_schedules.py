"""guided_step_ against `advance`, what the engine did before it, over whole runs of schedulers.

In float32, as the engine runs on a CPU, they are equal bit for bit.
"""

import pytest
import torch

from fasttrace.engine.schedule import Slots, advance, draw_noise, read_schedule
from fasttrace.testing.tiny import make_scheduler
from fasttrace_kernels.specs import GUIDED_STEP
from fasttrace_kernels.testing import assert_same_bits, assert_within

SLOTS = {
    "DDIM": Slots(1, 1, False),
    "PNDM": Slots(2, 4, False),
    "EulerAncestralDiscrete": Slots(1, 1, True),
    "DPMSolverMultistep": Slots(2, 2, False),
    "UniPCMultistep": Slots(3, 3, False),
}
LANES, ROW = 3, (4, 5, 6)
GUIDANCE = 7.3  # no number of float32
SEED = 11

# diffusers' own
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def make(name):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(12)
    schedule = read_schedule(scheduler)
    assert schedule.linear, schedule.why
    assert schedule.slots == SLOTS[name]
    return scheduler, schedule


def denoise(x, t):
    """Of every lane alone, and another one in each branch."""
    row = torch.arange(len(x)).reshape(-1, 1, 1, 1)
    return torch.tanh(x.float() * (1 + 0.1 * row) + 1e-3 * t).roll(1, -1).to(x.dtype)


class Run:
    """What a run starts with; both ways step through it from there."""

    def __init__(self, name, dtype, *, guided, shared_noise=False, tables=torch.float64):
        scheduler, self.schedule = make(name)
        generator = torch.Generator().manual_seed(SEED)
        latents = torch.randn(LANES, *ROW, generator=generator) * scheduler.init_noise_sigma
        self.latents, self.dtype, self.guided = latents.to(dtype), dtype, guided
        self.weights = self.schedule.weights.to(tables)
        self.input_scales = self.schedule.input_scales.to(tables)
        self.noise = None
        if self.schedule.slots.noise:
            drawn = [
                draw_noise(scheduler, latents[:1], {"generator": generator})
                for _ in range(1 if shared_noise else LANES)
            ]
            self.noise = torch.cat(drawn, 1).to(dtype)

    def branches(self, latents):
        return torch.cat([latents, latents]) if self.guided else latents

    def before(self):
        """Every call's state and input, the way of `advance`."""
        state = self.schedule.first_state(self.latents)
        sample = (self.latents * self.input_scales[0]).to(self.dtype)
        for call, t in enumerate(self.schedule.timesteps):
            state, sample = advance(
                denoise(self.branches(sample), t),
                state,
                torch.tensor([call]),
                GUIDANCE if self.guided else None,
                self.noise,
                weights=self.weights,
                input_scales=self.input_scales,
                slots=self.schedule.slots,
            )
            yield state, self.branches(sample)

    def now(self, step):
        state = self.schedule.first_state(self.latents)
        sample = self.branches((self.latents * self.input_scales[0]).to(self.dtype))
        counter = torch.tensor([0, 0])
        guidance = torch.tensor([GUIDANCE], dtype=self.weights.dtype) if self.guided else None
        for call, t in enumerate(self.schedule.timesteps):
            step(
                prediction=denoise(sample, t),
                state=state,
                sample=sample,
                counter=counter,
                weights=self.weights,
                input_scales=self.input_scales,
                guidance=guidance,
                noise=self.noise,
                latents=self.schedule.slots.latents,
            )
            assert counter.tolist() == [call + 1, 0]
            yield state.clone(), sample.clone()


@pytest.mark.parametrize("tables", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", SLOTS)
def test_float32_is_advance_bit_for_bit(function, name, guided, tables):
    run = Run(name, torch.float32, guided=guided, tables=tables)
    calls = 0
    for got, want in zip(run.now(function(GUIDED_STEP)), run.before(), strict=True):
        assert_same_bits(got[0], want[0])
        assert_same_bits(got[1], want[1])
        calls += 1
    assert calls == run.schedule.calls >= 12
    assert got[0].isfinite().all()


def test_one_noise_for_all_lanes(function):
    run = Run("EulerAncestralDiscrete", torch.float32, guided=True, shared_noise=True)
    assert run.noise.shape[1] == 1
    for got, want in zip(run.now(function(GUIDED_STEP)), run.before(), strict=True):
        assert_same_bits(got[0], want[0])


@pytest.mark.parametrize("name", SLOTS)
def test_float64_is_advance(function, name):
    """Which has its guidance in float64 too, so this is the same run bit for bit."""
    run = Run(name, torch.float64, guided=True)
    for got, want in zip(run.now(function(GUIDED_STEP)), run.before(), strict=True):
        assert_same_bits(got[0], want[0])
        assert_same_bits(got[1], want[1])


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_half_an_eps_from_the_exact_sum(function, form, name, dtype):
    """One call from one state, in float64 beside it: float32 inside and a single rounding."""
    if form == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off; tests/ptx does this as compiled")
    run = Run(name, dtype, guided=True)
    exact = Run(name, torch.float64, guided=True)
    steps = function(GUIDED_STEP)
    start = list(run.before())[5]
    generator = torch.Generator().manual_seed(5)
    arguments = {
        "prediction": torch.randn(2 * LANES, *ROW, generator=generator).to(dtype),
        "state": start[0].clone(),
        "sample": start[1].clone(),
        "counter": torch.tensor([6, 0]),
        "weights": run.weights,
        "input_scales": run.input_scales,
        "guidance": torch.tensor([GUIDANCE], dtype=torch.float64),
        "noise": run.noise,
        "latents": run.schedule.slots.latents,
    }
    want, _ = advance(
        arguments["prediction"].double(),
        arguments["state"].double(),
        torch.tensor([6]),
        GUIDANCE,
        None if run.noise is None else run.noise.double(),
        weights=exact.weights,
        input_scales=exact.input_scales,
        slots=exact.schedule.slots,
    )
    state, _, _ = GUIDED_STEP.outcome(steps, arguments)
    # Rounding to nearest, and the little that float32 was off before it.
    assert_within(state.double(), want, 0.5 * torch.finfo(dtype).eps * 1.01)


def test_a_wrong_schedule_shows(function):
    """The comparison can fail: one weight of one call off by a millionth."""
    run = Run("DPMSolverMultistep", torch.float32, guided=True)
    want = list(run.before())
    run.weights[4, 1] += 1e-6 * run.weights[4].abs().max()
    got = list(run.now(function(GUIDED_STEP)))
    same = [torch.equal(ours[0], theirs[0]) for ours, theirs in zip(got, want, strict=True)]
    assert same[:4] == [True] * 4
    assert not any(same[4:])
