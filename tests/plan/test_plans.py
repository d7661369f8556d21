"""What a plan asks for, and the content keys of its rows."""

import json

import pytest
import torch

from fasttrace import Corruption, Probe, Tracer
from fasttrace.adapters.scope import scope
from fasttrace.plan.lanes import SAME_INPUT
from fasttrace.testing.tiny import make_scheduler

DOG = Probe("a photo of a dog", "dog", "object")
CAT = Probe("a cat in the house", "cat", "object")
FEW = {"steps": 3, "metric": "latent_recovery", "sites": "attn2"}


@pytest.fixture(scope="module")
def tracer(sd):
    return Tracer(sd)


def test_order_and_counts(tracer):
    plan = tracer.plan([DOG, CAT], seeds=[4, 2], **FEW)
    assert plan.total == len(plan.rows) == len(set(plan.keys)) == plan.lanes == 2 * 2 * 4
    assert [(r.probe, r.seed) for r in plan.rows[::4]] == [(0, 4), (0, 2), (1, 4), (1, 2)]
    assert [r.lane.patches[0].site.index for r in plan.rows[:4]] == [2, 7, 14, 18]
    assert plan.calls == 4  # PNDM calls once more than it steps
    assert plan.manifest == json.loads(json.dumps(plan.manifest))


def test_metrics_share_lanes_and_pictures(tracer):
    asked = {**FEW, "metric": ["latent_recovery", "latent_distance"]}
    plan = tracer.plan(DOG, **asked)
    assert (plan.total, plan.lanes) == (8, 4)
    assert len({r.picture for r in plan.rows}) == 4


def test_seeds_of_each_probe(tracer):
    plan = tracer.plan([DOG, CAT], seeds={DOG: [0, 1], CAT: [1, 7]}, **FEW)
    assert [(r.probe, r.seed) for r in plan.rows[::4]] == [(0, 0), (0, 1), (1, 1), (1, 7)]


def test_duplicates_are_dropped_and_counted(tracer):
    once = tracer.plan([DOG, DOG], seeds=[1, 1], **FEW)
    assert once.total == 4
    windows = {**FEW, "window": [(0, 2), (0.0, 0.5), (2, 4)]}
    assert tracer.plan(DOG, **windows).total == 8
    same = {**FEW, "guidance": 1.0}
    assert tracer.plan(DOG, branch="both", **same).keys == tracer.plan(DOG, **same).keys


def test_keys_are_stable(tracer, folders):
    import fasttrace

    again = Tracer(fasttrace.load(str(folders["sd"])))
    assert again.plan(DOG, **FEW).keys == tracer.plan(DOG, **FEW).keys


CHANGES = {
    "probe": {"probes": Probe("a photo of a dog", "photo", "object")},
    "negative prompt": {"probes": Probe("a photo of a dog", "dog", "object", 0, "cat")},
    "seed": {"seeds": [1]},
    "steps": {"steps": 4},
    "guidance": {"guidance": 3.0},
    "size": {"height": 24},
    "eta": {"eta": 0.5},
    "branch": {"branch": "both"},
    "window": {"window": (0, 2)},
    "sigma": {"corruption": Corruption(sigma=1.0)},
    "noise seed": {"corruption": Corruption(seed=1)},
    "kind": {"corruption": "output_noise"},
    "metric": {"metric": "latent_distance"},
    "latents": {"latents": torch.ones(1, 4, 8, 8)},
    "generator": {"generator": torch.Generator().manual_seed(5)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_determines_the_score_is_in_the_key(tracer, change):
    base = set(tracer.plan(DOG, **FEW).keys)
    options = {"probes": DOG, **FEW, **change}
    assert not base & set(tracer.plan(**options).keys)


def test_the_model_and_its_scheduler_are_in_the_key(sd, tracer):
    base = set(tracer.plan(DOG, **FEW).keys)
    with scope(sd):
        sd.scheduler = make_scheduler("DDIM")
        assert not base & set(tracer.plan(DOG, **FEW).keys)
    with scope(sd, keep_weights=True):
        sd.vae.decoder.conv_out.bias += 1
        changed = tracer.plan(DOG, **FEW).keys
    assert not base & set(changed)


def test_a_generator_at_its_seed_is_the_seed(tracer):
    """A generator asks for the latents that its state gives, and is not advanced."""
    generator = torch.Generator().manual_seed(9)
    state = generator.get_state()
    keys = tracer.plan(DOG, generator=generator, **FEW).keys
    assert keys == tracer.plan(DOG, seeds=[9], **FEW).keys
    assert torch.equal(generator.get_state(), state)
    torch.randn(1, generator=generator)
    assert keys != tracer.plan(DOG, generator=generator, **FEW).keys


def test_provable_no_ops(tiny):
    """In the first call nothing differs before text enters, nor in the unconditional rows."""
    tracer = Tracer(tiny)
    options = {"steps": 2, "metric": "latent_recovery", "window": (0, 1)}
    cond = [r.status for r in tracer.plan(DOG, **options).rows]
    uncond = [r.status for r in tracer.plan(DOG, branch="uncond", **options).rows]
    assert set(uncond) == {SAME_INPUT}
    pooled = tracer.model.two_texts  # pooled text is in every ResNet
    assert cond == ["run" if pooled or i >= 2 else SAME_INPUT for i in range(len(cond))]
    later = {**options, "window": (1, 2)}
    assert {r.status for r in tracer.plan(DOG, **later).rows} == {"run"}
