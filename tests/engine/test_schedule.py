"""The linear schedule against diffusers' own schedulers: whole runs, call by call."""

import copy
from typing import Any

import pytest
import torch
from diffusers import schedulers
from torch import Tensor

from fasttrace.engine.schedule import (
    MOST_RESIDUAL,
    Schedule,
    Slots,
    advance,
    draw_noise,
    read_schedule,
)
from fasttrace.testing.tiny import make_scheduler

# Schedulers that compute in what they are given, and those that go through float32 inside.
EXACT = {
    "DDIM": Slots(1, 1, False),
    "PNDM": Slots(2, 4, False),
    "HeunDiscrete": Slots(1, 2, False),
    "DPMSolverSinglestep": Slots(1, 2, False),
    "UniPCMultistep": Slots(3, 3, False),
    "DEISMultistep": Slots(1, 2, False),
    "KDPM2Discrete": Slots(1, 2, False),
    "LCM": Slots(1, 1, True),
}
ROUNDED = {
    "EulerDiscrete": Slots(1, 1, False),
    "DPMSolverMultistep": Slots(2, 2, False),
    "EulerAncestralDiscrete": Slots(1, 1, True),
}
SHAPE = (1, 4, 6, 5)
# A step from the largest sigma to the smallest, 500 times less, cancels that much (two-step Heun).
ONE_CALL = torch.finfo(torch.float64).eps * 500

# diffusers' own
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def make(name: str, steps: int = 10, **options: Any) -> Any:
    scheduler = make_scheduler(name)
    if options:
        scheduler = type(scheduler).from_config(scheduler.config, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def linear(x: Tensor, t: Tensor) -> Tensor:
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / 4
    return torch.einsum("dc,bchw->bdhw", mix.to(x.dtype), x)


def curved(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(linear(x, t) * 2 + 1e-3 * t).roll(1, -1)


def start(scheduler: Any, dtype: torch.dtype) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(SHAPE, generator=generator, dtype=dtype)
    return latents * scheduler.init_noise_sigma, generator


def theirs(
    scheduler: Any, denoiser: Any, dtype: torch.dtype, timesteps: Any = None, **options: Any
) -> list[Tensor]:
    scheduler = copy.deepcopy(scheduler)
    latents, generator = start(scheduler, dtype)
    if options.pop("draws", False):
        options["generator"] = generator
    found = []
    for t in scheduler.timesteps if timesteps is None else timesteps:
        prediction = denoiser(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
        found.append(latents)
    return found


def read(scheduler: Any, timesteps: Any = None, **options: Any) -> Schedule:
    options.pop("draws", None)
    schedule = read_schedule(scheduler, options, timesteps)
    assert schedule.linear, schedule.why
    return schedule


def ours(
    schedule: Schedule,
    scheduler: Any,
    denoiser: Any,
    dtype: torch.dtype,
    timesteps: Any = None,
    **options: Any,
) -> list[Tensor]:
    draws = options.pop("draws", False)
    latents, generator = start(scheduler, dtype)
    noise = None
    if schedule.slots.noise:
        assert draws
        noise = draw_noise(scheduler, latents, options | {"generator": generator}, timesteps)
    state = schedule.first_state(latents)
    scaled = latents * schedule.input_scales[0].to(dtype)
    found = []
    for call, t in enumerate(schedule.timesteps):
        state, scaled = advance(
            denoiser(scaled, t),
            state,
            torch.tensor([call]),
            None,
            noise,
            weights=schedule.weights.to(dtype),
            input_scales=schedule.input_scales.to(dtype),
            slots=schedule.slots,
        )
        found.append(state[0])
    return found


def largest_difference(got: list[Tensor], want: list[Tensor]) -> float:
    assert len(got) == len(want)
    return max(
        float((g - w).abs().max() / w.square().mean().sqrt())
        for g, w in zip(got, want, strict=True)
    )


def check(scheduler: Any, name: str, **options: Any) -> Schedule:
    """Both denoisers in float64, and the curved one in float32 as the engine will run it."""
    draws = name in ("LCM", "EulerAncestralDiscrete") or bool(options.get("eta"))
    whole, one = (1e-11, ONE_CALL) if name in EXACT else (1e-5, 5e-7)
    schedule = read(scheduler, **options)
    assert schedule.residual <= one
    for denoiser, dtype, allowed in (
        (linear, torch.float64, whole),
        (curved, torch.float64, whole),
        (curved, torch.float32, 1e-4),
    ):
        want = theirs(scheduler, denoiser, dtype, draws=draws, **options)
        got = ours(schedule, scheduler, denoiser, dtype, draws=draws, **options)
        assert largest_difference(got, want) <= allowed
    return schedule


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_whole_runs(name, steps):
    schedule = check(make(name, steps), name)
    assert schedule.calls == {
        "PNDM": steps + 1 if steps > 1 else 1,
        "HeunDiscrete": 2 * steps - 1,
        "KDPM2Discrete": 2 * steps - 1,
    }.get(name, steps)
    if steps >= 20:
        assert schedule.slots == {**EXACT, **ROUNDED}[name]


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_prediction_types(name, kind):
    knows_no_sample = {"PNDM", "KDPM2Discrete", "EulerAncestralDiscrete"}
    if kind == "sample" and name in knows_no_sample:
        scheduler = make(name, prediction_type=kind)
        with pytest.raises((ValueError, NotImplementedError)):
            theirs(scheduler, linear, torch.float64)
        assert "can't be read as a sum" in read_schedule(scheduler).why
        return
    check(make(name, prediction_type=kind), name)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_spacings(name, spacing):
    check(make(name, timestep_spacing=spacing), name)


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscrete",
        "HeunDiscrete",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "UniPCMultistep",
        "DEISMultistep",
        "KDPM2Discrete",
    ],
)
def test_karras_sigmas(name):
    check(make(name, use_karras_sigmas=True), name)


@pytest.mark.parametrize(
    ("name", "options", "slots"),
    [
        ("DPMSolverMultistep", {"solver_order": 3}, Slots(3, 3, False)),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, Slots(2, 2, True)),
        ("DPMSolverMultistep", {"solver_order": 1, "euler_at_final": True}, Slots(1, 1, False)),
        ("UniPCMultistep", {"solver_order": 3}, Slots(4, 4, False)),
        ("DPMSolverSinglestep", {"solver_order": 3}, Slots(1, 3, False)),
        ("DDIM", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, None),
    ],
)
def test_variants(name, options, slots):
    scheduler = make(name, 20, **options)
    draws = "sde" in options.get("algorithm_type", "")
    want = theirs(scheduler, curved, torch.float64, draws=draws)
    schedule = read(scheduler)
    got = ours(schedule, scheduler, curved, torch.float64, draws=draws)
    assert largest_difference(got, want) <= 1e-5
    assert slots is None or schedule.slots == slots


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta(eta):
    schedule = check(make("DDIM"), "DDIM", eta=eta)
    assert schedule.slots == Slots(1, 1, True)


@pytest.mark.parametrize("name", [n for n in {**EXACT, **ROUNDED} if n not in ("LCM", "PNDM")])
def test_partial_schedules(name):
    """As image-to-image does it: the last part of the timesteps, beginning in their middle."""
    scheduler = make(name, 10)
    skipped = 4 * scheduler.order
    timesteps = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    draws = name == "EulerAncestralDiscrete"
    want = theirs(scheduler, curved, torch.float64, timesteps, draws=draws)
    schedule = read(scheduler, timesteps)
    got = ours(schedule, scheduler, curved, torch.float64, timesteps, draws=draws)
    assert schedule.calls == len(timesteps) == len(want)
    assert largest_difference(got, want) <= 1e-5


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("DDIM", {"clip_sample": True}, "not linear"),
        ("DDIM", {"thresholding": True}, "not linear"),
        ("DDIM", {"clip_sample": True, "clip_sample_range": 50.0}, "not linear"),
        ("DPMSolverMultistep", {"thresholding": True}, "not linear"),
        ("DDPM", {"variance_type": "learned_range", "clip_sample": False}, "learned variance"),
        ("PNDM", {"skip_prk_steps": False}, "last 4 predictions"),
    ],
)
def test_what_is_no_sum_says_why(name, options, reason):
    schedule = read_schedule(make(name, 20, **options))
    assert not schedule.linear
    assert reason in schedule.why
    assert schedule.calls >= 20


def test_a_scheduler_that_draws_twice_says_so():
    class Twice(schedulers.DDIMScheduler):
        def step(self, *args: Any, **options: Any) -> Any:
            torch.randn(1)
            torch.randn(1)
            return super().step(*args, **options)

    scheduler = Twice(clip_sample=False)
    scheduler.set_timesteps(3)
    assert "more than once" in read_schedule(scheduler).why


def test_a_wrong_weight_is_seen():
    """The check itself can fail: one weight off by a millionth."""
    scheduler = make("DDIM", 4)
    schedule = read(scheduler)
    schedule.weights[2, 0] += 1e-6
    got = ours(schedule, scheduler, curved, torch.float64)
    want = theirs(scheduler, curved, torch.float64)
    assert largest_difference(got[:2], want[:2]) <= 1e-11
    assert 1e-8 < largest_difference(got, want) < 10 * MOST_RESIDUAL


def test_nothing_outside_is_touched():
    scheduler = make("EulerAncestralDiscrete", 5)
    before = copy.deepcopy(scheduler.__dict__)
    random = torch.get_rng_state()
    read_schedule(scheduler)
    draw_noise(scheduler, torch.zeros(SHAPE), {"generator": torch.Generator().manual_seed(0)})
    assert torch.equal(torch.get_rng_state(), random)
    assert scheduler.__dict__.keys() == before.keys()
    for key, value in before.items():
        now = scheduler.__dict__[key]
        same = torch.equal(now, value) if isinstance(value, Tensor) else now == value
        assert same, key


class TestAdvance:
    def call(self, lanes: int = 3, **changes: Any) -> tuple[Tensor, Tensor]:
        """Two latents, two predictions and noise, with weights written as numbers."""
        slots = Slots(2, 2, True)
        generator = torch.Generator().manual_seed(1)
        options: dict[str, Any] = {
            "prediction": torch.randn(2 * lanes, 4, 3, 2, generator=generator),
            "state": torch.randn(3, lanes, 4, 3, 2, generator=generator),
            "call": torch.tensor([1]),
            "guidance": 7.5,
            "noise": torch.randn(2, 1, 4, 3, 2, generator=generator),
            "weights": torch.tensor([[9.0, 9, 9, 9, 9], [1.0, -0.5, 0.25, 2.0, 3.0]]),
            "input_scales": torch.tensor([9.0, 9.0, 0.5]),
            "slots": slots,
        }
        options |= changes
        self.options = options
        return advance(**options)

    def test_by_hand(self):
        state, scaled = self.call()
        prediction, old = self.options["prediction"], self.options["state"]
        guided = prediction[:3] + 7.5 * (prediction[3:] - prediction[:3])
        noise = self.options["noise"][1]
        latent = old[0] - 0.5 * old[1] + 0.25 * guided + 2 * old[2] + 3 * noise
        torch.testing.assert_close(state[0], latent)
        assert torch.equal(state[1], old[0])
        assert torch.equal(state[2], guided)
        assert torch.equal(scaled, state[0] * 0.5)

    def test_a_lane_does_not_depend_on_its_neighbours(self):
        state, _ = self.call()
        prediction, old = self.options["prediction"], self.options["state"]
        for lane in range(3):
            alone, _ = self.call(prediction=prediction[lane::3], state=old[:, lane : lane + 1])
            assert torch.equal(alone[:, 0], state[:, lane])

    def test_guidance_a_lane(self):
        state, _ = self.call(guidance=torch.full((3, 1, 1, 1), 7.5))
        assert torch.equal(state, self.call()[0])

    def test_half_precision_state_stays_wide(self):
        prediction = self.call()[0].new_ones(6, 4, 3, 2).half()
        state, scaled = self.call(prediction=prediction)
        assert (state.dtype, scaled.dtype) == (torch.float32, torch.float16)

    def test_no_value_is_read(self):
        """Tensors without values go through, so the call may be captured."""
        with torch._subclasses.FakeTensorMode():
            state, scaled = advance(
                torch.empty(6, 4, 3, 2),
                torch.empty(3, 3, 4, 3, 2),
                torch.zeros(1, dtype=torch.int64),
                7.5,
                torch.empty(2, 1, 4, 3, 2),
                weights=torch.empty(2, 5),
                input_scales=torch.empty(3),
                slots=Slots(2, 2, True),
            )
        assert state.shape == (3, 3, 4, 3, 2)
        assert scaled.shape == (3, 4, 3, 2)

    def test_missing_noise(self):
        with pytest.raises(ValueError, match="noise slot"):
            self.call(noise=None)
