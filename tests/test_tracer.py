"""The tracer from end to end: rows, pictures, resuming, and the pipeline left as it was."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fasttrace import Corruption, Metric, Probe, Tracer
from fasttrace.adapters.fingerprint import fingerprint
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CORRUPT
from fasttrace.errors import ModelError, UsageError
from fasttrace.plan.lanes import RUN
from fasttrace.testing import tiny_pipeline
from fasttrace.types import pair_pictures

RECOVERY = {"steps": 2, "metric": "latent_recovery"}


def brightness(pictures):
    return pictures.flatten(1).mean(1)


@pytest.fixture(scope="module")
def tracer(sd):
    return Tracer(sd)


def test_rows(tiny, probe):
    tracer = Tracer(tiny)
    sites = [s.name for s in tracer.sites()[::3]]
    plan = tracer.plan(probe, seeds=2, sites=sites, **RECOVERY)
    rows = [row for row, _ in tracer.iter_rows(plan)]
    assert [r.key for r in rows] == list(plan.keys)
    assert len(rows) == 2 * len(sites)
    for row in rows:
        assert (row.clean_score, row.corrupt_score) == (1.0, 0.0)
        assert row.total_effect == 1.0
        assert row.effect == row.score == row.normalised_effect
        assert 0 <= row.noise_floor < 1e-4
        assert (row.window_start, row.window_stop) == (0, plan.calls)
        assert row.fingerprint == fingerprint(tiny)
        assert json.loads(row.corruption)["sigma"] == (
            list(s) if isinstance(s := plan.corruption.sigma, tuple) else s
        )
        assert json.loads(row.sampling)["scheduler"] == "PNDMScheduler"
        assert set(json.loads(row.versions)) >= {"fasttrace", "torch", "diffusers", "python"}
    assert any(abs(r.effect) > 0.05 for r in rows)
    assert len({r.picture for r in rows}) == len(rows)


def test_the_pipeline_is_left_as_it_was(tiny, probe):
    before, rng = fingerprint(tiny), torch.get_rng_state()
    hooks = sum(len(m._forward_hooks) for m in tiny.unet.modules())
    scheduler = repr(sorted(tiny.scheduler.__dict__.items(), key=str))
    tiny.text_encoder.train()
    tracer = Tracer(tiny)
    tracer.trace(probe.prompt, probe.subject, sites="attn2", **RECOVERY)
    with pytest.raises(ZeroDivisionError):
        tracer.trace(probe, steps=1, sites="attn2", metric=lambda pictures: 1 / 0)
    assert tiny.text_encoder.training
    tiny.text_encoder.eval()
    assert fingerprint(tiny) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert sum(len(m._forward_hooks) for m in tiny.unet.modules()) == hooks
    assert repr(sorted(tiny.scheduler.__dict__.items(), key=str)) == scheduler
    assert torch.is_grad_enabled()


def test_nothing_is_changed_while_a_row_is_out(sd, tracer, probe):
    """Between two rows the caller finds the process and the model as they were."""
    rows = tracer.iter_rows(tracer.plan(probe, sites="attn2", **RECOVERY))
    rng = torch.get_rng_state()
    for _ in rows:
        assert torch.is_grad_enabled()
        assert not any(m._forward_hooks for m in sd.unet.modules())
        assert torch.equal(torch.get_rng_state(), rng)
        torch.rand(1)
        rng = torch.get_rng_state()


def test_clean_picture_is_the_pipelines(sd, tracer, probe):
    plan = tracer.plan(probe, seeds=[5], sites="attn2", steps=4, guidance=7.5, metric=brightness)
    row, pictures = next(tracer.iter_rows(plan))
    clean, corrupt = pair_pictures(row)
    assert list(pictures) == [row.picture, clean, corrupt]
    plain = sd(
        probe.prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images[0]  # fmt: skip
    torch.testing.assert_close(pictures[clean], plain, rtol=0, atol=1e-5)
    assert row.clean_score == pytest.approx(float(pictures[clean].mean()))
    assert row.corrupt_score == pytest.approx(float(pictures[corrupt].mean()))
    assert row.score == pytest.approx(float(pictures[row.picture].mean()))


def test_given_latents_and_generator(sd, tracer, probe):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"sites": "attn2", **RECOVERY}
    by_seed = [r.score for r, _ in tracer.iter_rows(tracer.plan(probe, seeds=[5], **options))]
    by_latents = tracer.plan(probe, seeds=[5], latents=latents, **options)
    generator = torch.Generator().manual_seed(5)
    by_generator = tracer.plan(probe, generator=generator, **options)
    assert [r.score for r, _ in tracer.iter_rows(by_latents)] == by_seed
    assert [r.score for r, _ in tracer.iter_rows(by_generator)] == by_seed


def test_pictures_come_once_per_pair(tracer, probe):
    plan = tracer.plan(probe, seeds=2, sites="attn2", **RECOVERY)
    counts = [len(pictures) for _, pictures in tracer.iter_rows(plan)]
    assert counts == [3, 1, 1, 1, 3, 1, 1, 1]
    without = list(tracer.iter_rows(plan, pictures=False))
    assert all(not pictures and row.picture is None for row, pictures in without)
    assert pair_pictures(without[0][0]) is None


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_resuming_runs_only_what_is_missing(sd, probe, engine):
    tracer = Tracer(sd, engine=engine)
    plan = tracer.plan([probe, Probe("a red car", "car")], sites="attn2", **RECOVERY)
    first = [row for row, _ in tracer.iter_rows(plan)]
    done = {r.key for r in first[:6]}
    seen = []
    rest = list(
        tracer.iter_rows(plan, done=done.__contains__, on_progress=lambda d, t: seen.append((d, t)))
    )
    if engine == "reference":
        assert [row for row, _ in rest] == first[6:]
    else:  # fewer lanes, so another batch shape
        assert [row.key for row, _ in rest] == [row.key for row in first[6:]]
        for (row, _), before in zip(rest, first[6:], strict=True):
            assert row.score == pytest.approx(before.score, abs=1e-5)
    assert len(rest[0][1]) == 3  # the first row it makes brings the pair's pictures along
    assert seen == [(4, 8), (7, 8), (8, 8)]
    assert list(tracer.iter_rows(plan, done=lambda key: True)) == []


def test_other_metric_later(tracer, probe):
    """A second metric over done rows runs the lanes again and gives the same as both at once."""
    options = {"sites": "attn2", "steps": 2}
    both = tracer.plan(probe, metric=["latent_recovery", "latent_distance"], **options)
    rows = [row for row, _ in tracer.iter_rows(both)]
    alone = tracer.plan(probe, metric="latent_distance", **options)
    later = [row for row, _ in tracer.iter_rows(alone)]
    assert later == [r for r in rows if r.metric == "latent_distance"]


def test_lower_is_closer_is_turned(tracer, probe):
    plan = tracer.plan(probe, sites="attn2", steps=2, metric=["latent_recovery", "latent_distance"])
    rows = [row for row, _ in tracer.iter_rows(plan)]
    for recovery, distance in zip(rows[::2], rows[1::2], strict=True):
        assert distance.clean_score == 0
        assert distance.total_effect == distance.corrupt_score > 0
        assert distance.normalised_effect == pytest.approx(recovery.normalised_effect, abs=1e-5)


def test_no_ops_are_listed_with_the_corrupt_score(tracer, probe):
    plan = tracer.plan(probe, component="text_encoder", steps=1, metric=brightness)
    rows = list(tracer.iter_rows(plan))
    idle = [(row, pictures) for row, pictures in rows if row.status != RUN]
    assert len(idle) == 9
    for row, pictures in idle:
        assert row.effect == 0
        assert row.score == row.corrupt_score
        assert row.picture == pair_pictures(row)[1]
        assert row.picture in pictures
    assert {r.component for r, _ in rows} == {"text_encoder"}


def test_listed_no_ops_really_are_the_corrupt_run(tiny, probe):
    """Run what the plan would not: bit for bit the corrupt latent."""
    tracer = Tracer(tiny, engine="reference")
    for options in ({"branch": "uncond"}, {}):
        plan = tracer.plan(probe, window=(0, 1), sites=["attn1", "resnet"], **options, **RECOVERY)
        idle = [r for r in plan.rows if r.status != RUN]
        forced = replace(plan, rows=tuple(replace(r, status=RUN) for r in idle))
        assert all(row.effect == 0 for row, _ in tracer.iter_rows(forced))


def test_text_encoder_rows(tiny, probe):
    tracer = Tracer(tiny)
    plan = tracer.plan(
        probe, component="text_encoder", sites="hidden", tokens=["last subject", "EOS"], **RECOVERY
    )
    rows = [row for row, _ in tracer.iter_rows(plan)]
    assert {r.selector for r in rows} == {"last subject", "EOS"}
    assert {r.component for r in rows} == {e.name for e in tracer.model.encoders}
    assert any(abs(r.effect) > 1e-3 for r in rows)


def test_windows_and_branches(tracer, probe):
    plan = tracer.plan(
        probe, sites="attn2", window=[(0, 1), (1, 3)], branch="both", seeds=[1], **RECOVERY
    )
    rows = [row for row, _ in tracer.iter_rows(plan)]
    assert [(r.window_start, r.window_stop) for r in rows] == [(0, 1)] * 4 + [(1, 3)] * 4
    assert {r.branch for r in rows} == {"both"}
    assert len({r.score for r in rows}) == 8


def test_swap(tiny, probe):
    """All cross-attention layers on the other prompt are its run (but for pooled text, in SDXL)."""
    tracer = Tracer(tiny)
    layers = tracer.sites(sites="attn2")
    whole = tracer.plan_swap(probe, "a red car", neighbours=len(layers), **RECOVERY)
    ((row, _),) = tracer.iter_rows(whole)
    assert row.kind == "swap"
    assert row.site == f"{layers[0].name}..{layers[-1].name}"
    assert json.loads(row.corruption)["other_prompt"] == "a red car"
    assert row.effect == row.clean_score - row.score
    if not tracer.model.two_texts:
        assert row.normalised_effect == 1.0
    pairs = tracer.swap("a photo of a dog", "a red car", neighbours=2, **RECOVERY)
    assert len(pairs.rows) == len(layers) - 1
    assert any(r.normalised_effect > 0.01 for r in pairs.rows)


def test_trace_returns_a_result(tracer, probe):
    seen = []
    result = tracer.trace(
        probe.prompt, probe.subject, attribute="object", seeds=2, sites="attn2",
        on_progress=lambda done, total: seen.append((done, total)), **RECOVERY,
    )  # fmt: skip
    assert len(result.rows) == 8
    assert seen == [(i, 8) for i in range(1, 9)]
    assert {e.site for e in result.aie()} == {s.name for s in tracer.sites(sites="attn2")}
    assert result.picture(result.rows[0].picture).size == (16, 16)


def test_several_probes_share_one_sigma(tracer):
    probes = [Probe("a photo of a dog", "dog"), Probe("a red car", "red car")]
    both = tracer.plan(probes, sites="attn2", **RECOVERY)
    again = tracer.plan(probes[0], sites="attn2", corruption=both.corruption, **RECOVERY)
    assert again.keys == both.keys[:4]
    assert tracer.plan(probes[0], sites="attn2", **RECOVERY).corruption != both.corruption


def test_edited_weights_want_a_new_plan(sd, tracer, probe):
    plan = tracer.plan(probe, sites="attn2", **RECOVERY)
    with scope(sd, keep_weights=True):
        sd.unet.conv_out.bias += 1
        with pytest.raises(UsageError, match="weights changed since the plan"):
            next(tracer.iter_rows(plan))


def test_a_metric_may_work_in_place_and_answers_in_numbers(tracer, probe):
    def spoil(pictures):
        return pictures.zero_().mean((1, 2, 3))

    options = {"steps": 1, "sites": "cross-attn-0-mid"}
    spoilt = tracer.trace(probe, metric=[spoil, brightness], **options)
    whole = tracer.trace(probe, metric=brightness, **options)
    assert [r.score for r in spoilt.where(metric="callable:brightness").rows] == [
        r.score for r in whole.rows
    ]
    kept = spoilt.picture(pair_pictures(spoilt.rows[0])[0])
    assert kept == whole.picture(pair_pictures(whole.rows[0])[0])
    for answer in (None, ["good"], 1j):
        with pytest.raises(ModelError, match=r"'callable:lambda' gave .*one number a picture"):
            tracer.trace(probe, metric=lambda pictures, a=answer: a, **options)


def test_metrics_that_misbehave(tracer, probe):
    def both(pictures):
        return torch.zeros(2)

    def never(pictures):
        return brightness(pictures) * float("nan")

    for metric, words in (
        (both, "gave 2 scores for 1 pictures"),
        (never, "'callable:.*never' gave"),
    ):
        with pytest.raises(ModelError, match=words):
            tracer.trace(
                probe,
                sites="attn2",
                steps=1,
                metric=Metric(f"callable:{metric.__name__}", "", lambda p, c, m=metric: m(p)),
            )


def test_half_precision(folders, probe):
    """Two calls: half precision is slow on a CPU."""
    import fasttrace

    tracer = Tracer(fasttrace.load(str(folders["sd"]), dtype="bfloat16"))
    plan = tracer.plan(probe, steps=2, sites="attn2", metric=[brightness, "latent_recovery"])
    rows = [row for row, _ in tracer.iter_rows(plan)]
    assert plan.manifest["dtype"] == "bfloat16"
    assert len(rows) == 8


def test_corruption_kinds_give_rows(tracer, probe):
    options = {"sites": "attn2", **RECOVERY}
    for corruption in ("output_noise", Corruption("replace", replacement="cat")):
        rows = [
            r for r, _ in tracer.iter_rows(tracer.plan(probe, corruption=corruption, **options))
        ]
        assert len(rows) == 4
        assert rows[0].total_effect == 1.0
    assert CORRUPT in rows[0].picture or rows[0].status == RUN


def test_importing_fasttrace_loads_no_torch():
    code = "import fasttrace, sys; sys.exit('torch' in sys.modules or not fasttrace.__version__)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lazy_names():
    import fasttrace

    assert all(getattr(fasttrace, name) is not None for name in fasttrace.__all__)
    assert set(fasttrace.__all__) <= set(dir(fasttrace))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fasttrace.nothing


def test_a_model_with_a_lora(probe):
    """Adapters are part of the model: same sites, another fingerprint, other scores."""
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline("sd")
    tracer = Tracer(pipe)
    plain, before = tracer.sites(), tracer.fingerprint
    options = {"sites": "attn2", "metric": brightness, "steps": 2}
    scores = [row.clean_score for row, _ in tracer.iter_rows(tracer.plan(probe, **options))]
    config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    assert tracer.sites() == plain
    assert tracer.fingerprint != before
    again = [row.clean_score for row, _ in tracer.iter_rows(tracer.plan(probe, **options))]
    assert len(again) == len(scores)
    assert again != scores
