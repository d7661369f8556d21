"""Recorded activations against plain hooks, their slices, and data sets on disk."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fasttrace
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.errors import StoreError, UsageError
from fasttrace.store.activations import MANIFEST, Writer
from fasttrace.testing import tiny_pipeline
from fasttrace.testing.tiny import make_scheduler

SETTING: dict[str, Any] = {"steps": 3, "guidance": 3.0}
PROMPT, OTHER = "a photo of a dog in the house", "a red car"


def by_hooks(pipe: Any, prompt: str, seed: int, **setting: Any) -> dict[str, list[Tensor]]:
    """The pipeline's own call, with a forward hook on every module: [2, ...] a call."""
    kept: dict[str, list[Tensor]] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if isinstance(out, Tensor):
                kept.setdefault(f"unet.{name}", []).append(out.clone())

        return hook

    def heads(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any) -> None:
            kept.setdefault(f"unet.{name}.heads", []).append(args[0].clone())

        return hook

    for name, module in pipe.unet.named_modules():
        handles.append(module.register_forward_hook(watch(name)))
        if hasattr(module, "to_out"):
            handles.append(module.to_out[0].register_forward_pre_hook(heads(name)))
    try:
        pipe(
            prompt,
            num_inference_steps=setting.get("steps", 3),
            guidance_scale=setting.get("guidance", 3.0),
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
    finally:
        for handle in handles:
            handle.remove()
    return kept


def stacked(kept: list[Tensor], rows: slice) -> Tensor:
    return torch.stack([out[rows].squeeze(0) for out in kept])


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    atol = 1e-4 * float(expected.square().mean().sqrt())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("branch", "rows"), [("cond", slice(1, 2)), ("uncond", slice(1)), ("both", slice(2))]
)
def test_equal_to_hooks(tiny, branch, rows):
    expected = by_hooks(tiny, PROMPT, 5)
    with fasttrace.record(tiny, ["paper", "*.heads", "*.hidden"], branch=branch) as acts:
        found = acts.run(PROMPT, seed=5, **SETTING)
        names = [site.name for site in acts.sites()]
    assert list(found.activations) == names
    assert len([n for n in names if n.endswith(".heads")]) > 3
    for name in names:
        if name.endswith(".hidden"):
            module = f"{name.removesuffix('.hidden')}.net.0"
            close(found[name], stacked(expected[module], rows))
        else:
            close(found[name], stacked(expected[name], rows))


def test_many_prompts_and_seeds(sd):
    """In batches of several sizes, each run is what it is alone."""
    prompts = [PROMPT, OTHER, "a tiny cat"]
    with fasttrace.record(sd, "attn2", lanes=4) as acts:
        found = acts.run(prompts, seed=[0, 7, 3], **SETTING)
    asked = [(p, s) for p in prompts for s in (0, 7, 3)]
    assert [(one.prompt, one.seed) for one in found] == asked
    for one in found:
        expected = by_hooks(sd, one.prompt, one.seed)
        for name, value in one.activations.items():
            close(value, stacked(expected[name], slice(1, 2)))


@pytest.mark.parametrize("scheduler", ["HeunDiscrete", "DDIM", "DDPM"])
def test_unguided_and_other_schedulers(scheduler):
    pipe = tiny_pipeline("sd")
    pipe.scheduler = make_scheduler(scheduler)
    expected = by_hooks(pipe, PROMPT, 1, guidance=1.0)
    with fasttrace.record(pipe, "unet.mid_block.resnets.1") as acts:
        found = acts.run([PROMPT, OTHER], seed=1, steps=3, guidance=1.0)[0]
    name = "unet.mid_block.resnets.1"
    close(found[name], stacked(expected[name], slice(None)))


def test_pictures_are_the_pipelines(sd):
    picture = sd(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    with fasttrace.record(sd, "attn2") as acts:
        one = acts.run(PROMPT, generator=torch.Generator().manual_seed(5), **SETTING)
    assert one.seed == 5
    assert np.abs(one.picture("np") - picture).max() < 1e-4
    assert one.picture("pt").shape == (3, 16, 16)
    assert np.array_equal(np.asarray(one.picture()), np.rint(one.picture("np") * 255))
    with pytest.raises(UsageError, match="output_type"):
        one.picture("jpeg")


def test_slices(sd):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    with fasttrace.record(sd, [name, f"{name}.heads"]) as acts:
        whole = acts.run(PROMPT, seed=0, **SETTING)
    heads = sd.unet.get_submodule(name.removeprefix("unet.")).heads
    assert heads > 1
    with fasttrace.record(sd, f"{name}.heads", heads=[1], tokens=[3, 0], window=(1, 3)) as acts:
        found = acts.run(PROMPT, seed=0, **SETTING)[f"{name}.heads"]
    expected = whole[f"{name}.heads"][1:3, [3, 0]].unflatten(-1, (heads, -1))[..., [1], :]
    assert torch.equal(found, expected)
    with fasttrace.record(sd, name, tokens=[1], window=(0.0, 0.5), dtype="float16") as acts:
        [found] = acts.run(PROMPT, seed=[0], **SETTING)  # a list gives a list
        with pytest.raises(UsageError, match="A prompt is text"):
            acts.run(5, seed=0)
    assert torch.equal(found[name], whole[name][:2, [1]].half())
    assert next(sd.unet.parameters()).dtype == torch.float32


def test_text_encoder_sites(tiny):
    model = Model(tiny)
    with scope(tiny):
        sites = [site for encoder in model.encoders for site in encoder.sites()]
    names = [sites[0].name, sites[-1].name]
    with fasttrace.record(tiny, ["attn2", *names], tokens=[0, 2]) as acts:
        found = acts.run(PROMPT, seed=0, **SETTING)
    for name in names:
        kept: list[Tensor] = []
        modules = {n: m for e in model.encoders for n, m in e.modules().items()}
        hook = modules[name].register_forward_hook(
            lambda _m, _a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model.family.read(PROMPT)
        hook.remove()
        close(found[name], kept[0][0, [0, 2]])


def test_progress(sd):
    seen = []
    with fasttrace.record(sd, "attn2") as acts:
        acts.run(
            [PROMPT, OTHER],
            seed=0,
            callback_on_step_end=lambda pipe, call, t, about: seen.append(
                (pipe is sd, call, int(t), about["lanes"])
            ),
            **SETTING,
        )
    times = [int(t) for t in Model(sd).scheduler(3).timesteps]
    assert seen == [(True, call, t, 2) for call, t in enumerate(times)]


def test_nothing_is_left_behind(sd):
    def state() -> Any:
        modules = list(sd.unet.modules())
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        places = [p.data_ptr() for p in sd.unet.parameters()]
        return hooks, places, [m.training for m in modules], torch.get_rng_state().tolist()

    before = state()
    with pytest.raises(RuntimeError), fasttrace.record(sd, "attn2") as acts:  # noqa: PT012
        acts.run(PROMPT, seed=0, **SETTING)
        raise RuntimeError
    assert state() == before
    with pytest.raises(UsageError, match="has ended"):
        acts.run(PROMPT, seed=0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such site": ({"sites": "attn7"}, "No site matches"),
    "no sites": ({"sites": []}, "list of sites is empty"),
    "tokens of places": ({"sites": "resnet", "tokens": [0]}, "no tokens"),
    "a token beyond": ({"sites": "ff", "tokens": [10**6]}, "has tokens 0 to"),
    "heads of a module": ({"sites": "attn2", "heads": [0]}, "has no heads"),
    "a head beyond": ({"sites": "*.attn2.heads", "heads": [99]}, "has heads 0 to"),
    "a window": ({"sites": "attn2", "window": (0, 99)}, "outside the run"),
    "keys": ({"sites": "*.attn2.key"}, "No site matches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(sd, name):
    given, words = REFUSED[name]
    with pytest.raises(UsageError, match=words), fasttrace.record(sd, **given) as acts:
        acts.run(PROMPT, seed=0, **SETTING)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"branch": "left"}, "branch"),
        ({"shard_bytes": 0}, "shard_"),
        ({"dtype": "int4"}, "dtype"),
        ({"tokens": "subject"}, "tokens is a list of whole numbers"),
        ({"tokens": 3}, "tokens is"),
        ({"tokens": [0.5]}, "tokens is"),
        ({"tokens": []}, "tokens is"),
        ({"heads": [True]}, "heads is"),
    ],
)
def test_records_refused(sd, given, words):
    with pytest.raises(UsageError, match=words), fasttrace.record(sd, "attn2", **given):
        pass


# ---- on disk

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


def test_a_data_set(sd, tmp_path):
    out, seeds = tmp_path / "acts", [0, 1, 2]
    options: dict[str, Any] = {"out": out, "shard_bytes": 20_000, "lanes": 4}
    with fasttrace.record(sd, [SITE, "ff"], **options) as acts:
        assert acts.run([PROMPT, OTHER], seed=seeds, **SETTING) is None
    with fasttrace.record(sd, [SITE, "ff"]) as acts:
        expected = acts.run([PROMPT, OTHER], seed=seeds, **SETTING)
    read = fasttrace.Activations(out)
    assert len(read) == len(expected) == 6
    assert set(read.sites) == set(expected[0].activations)
    shards = sorted(out.glob("shard-*.safetensors"))
    assert len(shards) > 2
    each = sum(value.nbytes for value in expected[0].activations.values())
    assert max(path.stat().st_size for path in shards) < 20_000 + each + 4096
    for sample, one in zip(read, expected, strict=True):
        assert (sample.about["prompt"], sample.about["seed"]) == (one.prompt, one.seed)
        for site in read.sites:
            close(sample[site], one[site])
    mean = torch.stack([one[SITE] for one in expected]).double().mean(0)
    close(read.mean(SITE), mean)
    # What it is a data set of can be written back: a mean ablation.
    tracer = fasttrace.Tracer(sd)
    source = fasttrace.Source("tensor", values={SITE: read.mean(SITE).float()})
    probe = fasttrace.Probe(PROMPT, "dog")
    plan = tracer.plan(
        probe, sites=SITE, source=source, base="clean", metric="latent_distance", **SETTING
    )
    [(row, _)] = tracer.iter_rows(plan)
    assert row.effect > row.noise_floor


def test_goes_on_where_it_stopped(sd, tmp_path, monkeypatch):
    out = tmp_path / "acts"
    options: dict[str, Any] = {"out": out, "shard_bytes": 1}
    calls: list[int] = []
    kept = Writer.add

    def dies(self: Writer, *rest: Any) -> None:
        if len(self.known) == 2:
            raise KeyboardInterrupt
        kept(self, *rest)

    monkeypatch.setattr(Writer, "add", dies)
    with pytest.raises(KeyboardInterrupt), fasttrace.record(sd, SITE, **options) as acts:
        acts.run(PROMPT, seed=[0, 1, 2, 3], **SETTING)
    monkeypatch.undo()
    assert len(fasttrace.Activations(out)) == 2
    with fasttrace.record(sd, SITE, **options) as acts:
        acts.run(
            PROMPT,
            seed=[0, 1, 2, 3],
            callback_on_step_end=lambda pipe, call, t, about: calls.append(about["lanes"]),
            **SETTING,
        )
    assert sum(calls) == 2 * 4  # two runs were left, of four calls each
    read = fasttrace.Activations(out)
    assert [sample.about["seed"] for sample in read] == [0, 1, 2, 3]
    with fasttrace.record(sd, SITE, **options) as acts:
        acts.run(PROMPT, seed=[0, 1, 2, 3], **SETTING)
    assert len(fasttrace.Activations(out)) == 4


def test_directories(sd, tmp_path):
    def run(out: Any, sites: Any = SITE, **rest: Any) -> None:
        with fasttrace.record(sd, sites, out=out, **rest) as acts:
            acts.run(PROMPT, seed=0, **SETTING)

    out = tmp_path / "acts"
    run(out)
    with pytest.raises(StoreError, match="other values of sites"):
        run(out, "ff")
    with pytest.raises(StoreError, match="other values of .*dtype"):
        run(out, dtype="float16")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match="belongs to something else"):
        run(stranger)
    assert [p.name for p in stranger.iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreError, match="holds no activations"):
        fasttrace.Activations(tmp_path / "nothing")
    held = fasttrace.record(sd, SITE, out=out)
    with held as acts:
        acts.run(OTHER, seed=0, **SETTING)
        with pytest.raises(StoreError, match="another process is writing"):
            Writer.open(out, fasttrace.Activations(out).fixed, 1)
    shard = next(out.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(StoreError, match="is damaged"):
        fasttrace.Activations(out)
    (out / MANIFEST).write_text("{}")
    with pytest.raises(StoreError, match="is damaged or from another version"):
        run(out)


def test_the_format(sd, tmp_path):
    """As the documentation says it: others read it without fasttrace."""
    out = tmp_path / "acts"
    with fasttrace.record(sd, SITE, out=out) as acts:
        acts.run(PROMPT, seed=[4, 5], **SETTING)
    fixed = json.loads((out / MANIFEST).read_text())["fixed"]
    assert list(fixed["sites"]) == [SITE]
    with safe_open(out / "shard-00000.safetensors", "np") as file:
        samples = json.loads(file.metadata()["samples"])
        assert [one["seed"] for one in samples] == [4, 5]
        assert list(file.get_tensor(f"1/{SITE}").shape) == fixed["sites"][SITE]
