"""Patches from any tensor: the reference against hooks by hand, the fast engine against it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrace.adapters.corruption import corrupt_text, resolve
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.text import Text
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Pair
from fasttrace.engine.compiled import of_model
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.job import Job
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.engine.text_lanes import TextLanes
from fasttrace.engine.work import bound
from fasttrace.errors import ModelError
from fasttrace.testing import runs_of_pairs
from fasttrace.types import Corruption, Lane, Patch, Probe, Sampling, Selector, Site

PROBES = (Probe("a photo of a dog in the house", "dog"), Probe("a red car", "car"))
CALLS = 4  # PNDM makes one more than the steps
STEPS = 3
CLOSE = 1e-4
CAT, HOUSE = "prompt:a tiny cat", "prompt:the blue house with a dog"
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "cache": {"clean": "cache"},
    "leader": {"clean": "leader"},
    "small batches": {"lanes": 5},
    "smallest": {"clean": "leader", "lanes": 4},
    "nothing shared": {"sharing": False, "pruning": False},
    "one pair at a time": {"pairs": 1},
    "little memory": {"cache": 100_000, "lanes": 8},
    "staged": {"staged": True},
    "host, staged": {"staged": True, "home": "host", "clean": "cache"},
}


def tensors_for(sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """One a site and kind: whole, of a call each, channels alone."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for i, site in enumerate(sites):
        lead = CALLS if i % 2 else 1
        channels = (1, site.shape[1]) if len(site.shape) == 2 else (site.shape[0], 1, 1)
        shape = channels if i % 3 == 0 else site.shape
        for kind in ("tensor", "add"):
            found[f"{kind}:{site.name}"] = torch.randn(lead, *shape, generator=generator)
    return found


def lanes_for(sites: tuple[Site, ...]) -> list[Lane]:
    def lane(site: Site, source: str, strength: float = 1.0, **chosen: Any) -> Lane:
        return Lane((Patch(site, Selector(**chosen), source, strength),))

    sources = ("zero", "mean", CAT, HOUSE)
    lanes = [lane(site, sources[i % 4]) for i, site in enumerate(sites)]
    for i, site in enumerate(sites):
        lanes += [lane(site, f"tensor:{site.name}"), lane(site, f"add:{site.name}", 0.7)]
        lanes += [lane(site, "clean")] if i % 2 else []
    first, middle, last = sites[0], sites[len(sites) // 2], sites[-1]
    return [
        *lanes,
        lane(middle, "zero", window=(1, 3)),
        lane(middle, "mean", branch="both", window=(2, 4)),
        lane(first, "mean", branch="uncond"),
        lane(first, CAT, 0.5, branch="both"),
        lane(middle, HOUSE, branch="uncond", window=(0, 2)),
        lane(last, f"add:{last.name}", -2.0, branch="both", window=(1, 2)),
        lane(last, f"tensor:{last.name}", 0.25, branch="uncond"),
        lane(middle, f"add:{middle.name}", 0.0),
        Lane((Patch(first, source=f"add:{first.name}"), Patch(last, source="zero"))),
        Lane((Patch(middle, source="corrupt"), Patch(last, source=f"add:{last.name}"))),
    ]


def pairs_for(
    model: Model,
    lanes: list[Lane],
    tensors: dict[str, Tensor],
    *,
    base: str = CORRUPT,
    guidance: float = 3.0,
    steps: int = STEPS,
    eta: float = 0.0,
) -> list[Pair]:
    size = model.default("height")
    sampling = Sampling(steps, guidance, size, size, eta)
    corruption = resolve(model, list(PROBES), Corruption())
    pairs = []
    for seed, probe in enumerate(PROBES):
        start = model.start(sampling, seed)
        clean = model.text(probe.prompt, probe.negative_prompt, model.guided(sampling), start)
        texts = {CLEAN: clean, CORRUPT: corrupt_text(model, probe, corruption, clean)}
        for other in (CAT, HOUSE):
            [texts[other]] = model.encode([other.removeprefix("prompt:")], clean)
        pairs.append(Pair(texts, base, start, sampling, tuple(lanes), tensors=tensors))
    return pairs


def sites_of(model: Model) -> tuple[Site, ...]:
    size = model.default("height")
    return model.sites(size, size).sites


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_same(found: dict[Any, Tensor], expected: dict[Any, Tensor], lanes: list[Lane]) -> None:
    keys = {key for key in expected if key[1] != FLOOR}
    assert keys == {key for key in found if key[1] != FLOOR}
    for key in keys:
        worst = float((found[key] - expected[key]).abs().max())
        assert worst <= CLOSE * rms(expected[key]), (key, worst, lanes[key[1]])


TRACED: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of one model share its trace, seconds each."""

    def traced(model: Model, sampling: Sampling, example: Text) -> Any:
        key = id(model.unet), sampling.height, tuple(example.cond.shape)
        if key not in TRACED:
            TRACED[key] = of_model(model, sampling, example)
        return TRACED[key]

    monkeypatch.setattr("fasttrace.engine.workshop.of_model", traced)


@pytest.fixture(scope="module", params=["sd", "sdxl", "kandinsky22"])
def asked(request: pytest.FixtureRequest, loaded: Callable[[str], Any]) -> Any:
    """Pairs and their runs in the reference engine."""
    pipe = loaded(request.param)
    model = Model(pipe)
    with scope(pipe):
        sites = sites_of(model)
        lanes = lanes_for(sites if request.param != "kandinsky22" else sites[::3])
        steps = STEPS if request.param != "kandinsky22" else CALLS
        pairs = pairs_for(model, lanes, tensors_for(sites), steps=steps)
        assert len(model.scheduler(steps).timesteps) == CALLS
        return pipe, pairs, runs_of_pairs(ReferenceEngine(model), pairs)


def test_every_lane_is_the_reference(asked, subtests):
    pipe, pairs, expected = asked
    lanes = list(pairs[0].lanes)
    ways = {"sd": None, "sdxl": 4}.get(Model(pipe).name, 1)  # each takes seconds
    for name in list(OPTIONS)[:ways]:
        with subtests.test(name), scope(pipe):
            engine = FastEngine(Model(pipe), **OPTIONS[name])
            predicted = start = 0
            while start < len(pairs):
                job = Job(engine.workshop, pairs[start:])
                predicted += job.work.flops(job.denoiser)
                least = bound(job.denoiser.cost, job.setting, len(job.pairs), job.todo)
                assert least <= job.work.useful(job.denoiser.cost, job.todo)
                start += len(job.pairs)
            found = runs_of_pairs(engine, pairs)
            assert engine.executed == predicted
            assert_same(found, expected, lanes)
            again = runs_of_pairs(engine, pairs)
            assert all(torch.equal(found[key], again[key]) for key in found)


def test_every_lane_does_something(asked):
    """A strength of 0 alone changes nothing: else a comparison would say little."""
    _, pairs, expected = asked
    for i, lane in enumerate(pairs[0].lanes):
        same = torch.equal(expected[0, i], expected[0, CORRUPT])
        assert same == all(p.strength == 0 for p in lane.patches), lane


@pytest.mark.parametrize("base", [CLEAN, CORRUPT])
def test_unguided_and_on_the_clean_run(tiny, base):
    model = Model(tiny)
    with scope(tiny):
        sites = sites_of(model)[::2]
        lanes = [x for x in lanes_for(sites) if x.patches[0].selector.branch != "uncond"]
        pairs = pairs_for(model, lanes, tensors_for(sites), base=base, guidance=1.0)
        expected = runs_of_pairs(ReferenceEngine(model), pairs)
        assert_same(runs_of_pairs(FastEngine(model), pairs), expected, lanes)


def test_pruned_graphs(sd):
    """Lanes of one site, whatever they take there, have a graph of their own."""
    model = Model(sd)
    site = [s for s in sites_of(model) if s.kind == "resnet"][-1]
    tensors = {f"tensor:{i}": torch.randn(1, *site.shape) for i in range(3)}
    sources = ["zero", "mean", CAT, HOUSE, "clean", *tensors]
    lanes = [Lane((Patch(site, source=s),)) for s in sources]
    lanes += [Lane((Patch(site, Selector(window=(1, 3)), s),)) for s in sources]
    with scope(sd):
        pairs = pairs_for(model, lanes, tensors)
        engine = FastEngine(model, lanes=10)
        batches = [b for b in Job(engine.workshop, pairs).work.batches if b.pruned == site.name]
        pruned = {lanes[i].patches[0].source for batch in batches for _, i in batch.lanes}
        assert pruned >= {"zero", "mean", CAT, HOUSE, *tensors}
        expected = runs_of_pairs(ReferenceEngine(model), pairs)
        assert_same(runs_of_pairs(engine, pairs), expected, lanes)


def test_a_tensor_changes_and_nothing_of_it_stays(sd):
    """One engine, one cache: what an earlier trace left in it is not read by a later one."""
    model = Model(sd)
    site = sites_of(model)[4]
    with scope(sd):
        engine = FastEngine(model)
        for value in (3.0, -1.0):
            tensors = {"tensor:x": torch.full((1, *site.shape), value)}
            for source in ("tensor:x", "zero", "tensor:x"):
                lanes = [Lane((Patch(site, source=source),))]
                pairs = pairs_for(model, lanes, tensors)
                expected = runs_of_pairs(ReferenceEngine(model), pairs)
                assert_same(runs_of_pairs(engine, pairs), expected, lanes)


# ---- the definition, by hand


def by_hand(model: Model, pair: Pair, site: Site, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The base run with a plain hook that changes the conditional rows of one module."""
    module = model.unet_modules()[site.name]

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        uncond, cond = tensor.chunk(2)
        new = torch.cat([uncond, change(cond)])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        return ReferenceEngine(model).denoise(pair.base, pair.texts[pair.base], pair)
    finally:
        handle.remove()


def kept_by_hand(model: Model, pair: Pair, site: Site, run: str) -> list[Tensor]:
    """The conditional activations of a run, call by call."""
    kept: list[Tensor] = []
    module = model.unet_modules()[site.name]
    handle = module.register_forward_hook(lambda _m, _a, out: kept.append(out.chunk(2)[1].clone()))
    try:
        ReferenceEngine(model).denoise(run, pair.texts[run], pair)
    finally:
        handle.remove()
    return kept


@pytest.mark.parametrize("kind", ["resnet", "attn2"])
def test_by_hand(sd, kind):
    model = Model(sd)
    site = [s for s in sites_of(model) if s.kind == kind][1]
    with scope(sd):
        tensors = {
            "tensor:x": torch.randn(CALLS, *site.shape),
            "add:x": torch.randn(1, *site.shape),
        }
        sources = ["zero", "mean", CAT, "tensor:x", "add:x"]
        lanes = [Lane((Patch(site, source=s, strength=0.5),)) for s in sources]
        pair = pairs_for(model, lanes, tensors)[0]
        found = runs_of_pairs(ReferenceEngine(model), [pair])
        clean = iter(kept_by_hand(model, pair, site, CLEAN))
        cat = iter(kept_by_hand(model, pair, site, CAT))
        values = iter(tensors["tensor:x"])

        def mean(own: Tensor) -> Tensor:
            value = next(clean)
            places = (1,) if value.ndim == 3 else (2, 3)
            return torch.lerp(own, value.mean(places, keepdim=True).expand_as(own), 0.5)

        changes = [
            lambda own: own * 0.5,
            mean,
            lambda own: torch.lerp(own, next(cat), 0.5),
            lambda own: torch.lerp(own, next(values)[None], 0.5),
            lambda own: own + 0.5 * tensors["add:x"],
        ]
        for i, change in enumerate(changes):
            expected = by_hand(model, pair, site, change)
            assert not torch.equal(expected, found[0, CORRUPT])
            torch.testing.assert_close(found[0, i], expected, rtol=0, atol=1e-5, msg=sources[i])


def test_a_run_of_its_own_prompt_is_the_clean_run(sd):
    """Patching every last ResNet of a run with another prompt's gives that prompt's latent."""
    model = Model(sd)
    with scope(sd):
        sites = sites_of(model)
        whole = model.sites(16, 16).whole[-1]
        lanes = [Lane((Patch(whole, Selector(branch="both"), CAT),))]
        pair = pairs_for(model, lanes, {})[0]
        assert whole.name.startswith("unet.up_blocks")
        alone = ReferenceEngine(model).denoise("cat", pair.texts[CAT], pair)
        for engine in (ReferenceEngine(model), FastEngine(model)):
            found = runs_of_pairs(engine, [pair])
            torch.testing.assert_close(found[0, 0], alone, rtol=0, atol=1e-4)
        assert len(sites) > 4


# ---- what is refused, what is left behind


@pytest.mark.parametrize("engine", [ReferenceEngine, FastEngine])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tensor:absent", "names no tensor that was given"),
        ("add:absent", "names no tensor that was given"),
        ("tensor:calls", "expected \\[1 or 4"),
        ("tensor:shape", "that broadcasts to"),
        ("prompt:a dog that nobody encoded", "which is not made"),
        ("nonsense", "which is not made"),
    ],
)
def test_a_source_that_is_not_there(sd, engine, source, words):
    model = Model(sd)
    site = sites_of(model)[3]
    tensors = {
        "tensor:calls": torch.zeros(CALLS + 1, *site.shape),
        "tensor:shape": torch.zeros(1, *site.shape[:-1], site.shape[-1] + 1),
    }
    before = [len(m._forward_hooks) for m in sd.unet.modules()]
    with scope(sd):
        pairs = pairs_for(model, [Lane((Patch(site, source=source),))], tensors)
        with pytest.raises(ModelError, match=words):
            runs_of_pairs(engine(model), pairs)
    assert before == [len(m._forward_hooks) for m in sd.unet.modules()]


@pytest.mark.parametrize("engine", [ReferenceEngine, FastEngine])
def test_a_patch_that_reaches_nothing(sd, engine):
    model = Model(sd)
    site = sites_of(model)[3]
    lanes = [Lane((Patch(site, Selector(window=(CALLS, CALLS + 1)), "zero"),))]
    with scope(sd), pytest.raises(ModelError, match="reached no tensor"):
        runs_of_pairs(engine(model), pairs_for(model, lanes, {}))


# ---- text encoders


def test_text_encoder_sites(tiny):
    """Zero, mean, another prompt, a tensor, a direction: of the encoder's own activations."""
    model = Model(tiny)
    probe = PROBES[0]
    with scope(tiny):
        corruption = resolve(model, [probe], Corruption())
        clean = model.text(probe.prompt, "", True)
        site = next(s for s in model.encoders[0].sites() if s.kind == "mlp")
        direction = torch.randn(1, 1, site.shape[-1])
        tensors = {"add:x": direction, "tensor:x": direction}
        position = Selector(tokens=(3, 5))
        module = model.encoders[0].modules()[site.name]
        others: dict[str, Tensor] = {}
        for name, prompt in (("clean", probe.prompt), ("cat", "a tiny cat")):

            def keep(_m: Any, _a: Any, out: Any, name: str = name) -> None:
                others[name] = (out[0] if isinstance(out, tuple) else out).clone()

            handle = module.register_forward_hook(keep)
            model.family.read(prompt)
            handle.remove()
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "zero": torch.zeros_like,
            "mean": lambda own: others["clean"].mean(1, keepdim=True).expand_as(own),
            CAT: lambda own: others["cat"],
            "tensor:x": lambda own: direction.expand_as(own),
            "add:x": lambda own: own + 2.0 * direction,
        }
        for base in (CLEAN, CORRUPT):
            lanes = TextLanes(model, probe, corruption, clean, base=base, tensors=tensors)
            for source, change in changes.items():
                amount = 2.0 if source == "add:x" else 1.0
                [found] = lanes.texts([Lane((Patch(site, position, source, amount),))])

                def hook(_m: Any, _a: Any, out: Any, change: Any = change) -> Any:
                    own = out[0] if isinstance(out, tuple) else out
                    new = own.clone()
                    new[:, [3, 5]] = change(own)[:, [3, 5]]
                    return (new, *out[1:]) if isinstance(out, tuple) else new

                handle = module.register_forward_hook(hook)
                expected = (
                    corrupt_text(model, probe, corruption, clean)
                    if base == CORRUPT
                    else model.encode([probe.prompt], clean)[0]
                )
                handle.remove()
                torch.testing.assert_close(found.cond, expected.cond, rtol=0, atol=1e-6)
                assert not torch.equal(found.cond, clean.cond)
