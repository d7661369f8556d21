"""Text encoders by structure: sites, reach, and what the causal mask makes of them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fasttrace.adapters.corruption import corrupt_text, resolve
from fasttrace.adapters.hooks import rewriting
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.text import encode_cond, text_core
from fasttrace.engine.text_lanes import TextLanes
from fasttrace.errors import ModelError
from fasttrace.plan.lanes import CAUSAL, RUN, UNREACHABLE, text_lanes
from fasttrace.types import Corruption, Lane, Patch


def test_both_layouts():
    inner = nn.Module()
    inner.embeddings, inner.encoder = nn.Module(), nn.Module()
    inner.encoder.layers = nn.ModuleList()
    outer = nn.Module()
    outer.text_model = inner
    assert text_core(inner) is inner
    assert text_core(outer) is inner
    with pytest.raises(ModelError, match="no CLIP layout"):
        text_core(nn.Linear(1, 1))


def test_sites(tiny):
    encoders = Model(tiny).encoders
    assert [e.name for e in encoders] == ["text_encoder", "text_encoder_2"][: len(encoders)]
    for encoder in encoders:
        sites = encoder.sites()
        assert [s.kind for s in sites] == ["attn", "mlp", "hidden"] * 3
        assert [s.index for s in sites] == list(range(9))
        assert set(encoder.modules()) == {s.name for s in sites}
        assert all(s.shape == (24, 16) for s in sites)


def test_embedding_equals_the_pipelines(tiny, probe):
    model = Model(tiny)
    with scope(tiny):
        whole = tiny.encode_prompt(
            probe.prompt, device=model.device, num_images_per_prompt=1,
            do_classifier_free_guidance=True, negative_prompt="a cat",
        )  # fmt: skip
        text = model.text(probe.prompt, "a cat", guided=True)
    found = (text.cond, text.uncond, text.pooled, text.uncond_pooled)
    for ours, theirs in zip(found, whole, strict=False):
        assert torch.equal(ours, theirs)
    with scope(tiny):
        default = tiny.encode_prompt(
            probe.prompt, device=model.device, num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )  # fmt: skip
        assert torch.equal(model.text(probe.prompt, "", guided=True).uncond, default[1])


def test_reach_is_what_the_encoders_do(tiny, probe):
    """Disturb one site at one token: the denoiser's text moves exactly where we say it does."""
    model = Model(tiny)
    with scope(tiny):
        cond, pooled = encode_cond(tiny, probe.prompt, model.device)
        for encoder in model.encoders:
            eos = encoder.tokens(probe.prompt).eos
            for site in encoder.sites():
                for token in (0, 5, eos, eos + 3):
                    moved = self_disturbed(model, site, encoder.modules()[site.name], token, probe)
                    same = torch.equal(moved[0], cond)
                    if pooled is not None:
                        same = same and torch.equal(moved[1], pooled)
                    assert same != encoder.reached(site, token, eos), (site.name, token)


def self_disturbed(model, site, module, token, probe):
    def shift(_, out):
        new = out.clone()
        new[:, token] += torch.linspace(-1, 1, new.shape[-1])
        return new

    with rewriting({site.name: module}, shift, first=True):
        return encode_cond(model.pipe, probe.prompt, model.device)


def test_lanes_not_run_are_the_corrupt_text_bit_for_bit(tiny, probe):
    model = Model(tiny)
    corruption = resolve(model, [probe], Corruption())
    with scope(tiny):
        clean = model.text(probe.prompt, "", guided=True)
        corrupt = corrupt_text(model, probe, corruption, clean)
        lanes = TextLanes(model, probe, corruption, clean)
        sites = [s for e in model.encoders for s in e.sites()]
        statuses = set()
        for lane, status in text_lanes(model, probe, sites, "default", corruption):
            text = lanes.texts([lane])[0]
            same = torch.equal(text.cond, corrupt.cond)
            if text.pooled is not None:
                same = same and torch.equal(text.pooled, corrupt.pooled)
            assert same == (status != RUN), (lane.patches[0].site.name, lane.patches[0].selector)
            assert torch.equal(text.uncond, clean.uncond)
            statuses.add(status)
    joined = len(model.encoders) > 1
    assert statuses == ({RUN, CAUSAL, UNREACHABLE} if joined else {RUN, CAUSAL})


def test_the_whole_last_layer_restored_is_the_clean_text(sd, probe):
    model = Model(sd)
    corruption = resolve(model, [probe], Corruption())
    with scope(sd):
        clean = model.text(probe.prompt, "", guided=False)
        lanes = TextLanes(model, probe, corruption, clean)
        last = model.encoders[0].sites()[-1]
        assert torch.equal(lanes.texts([Lane((Patch(last),))])[0].cond, clean.cond)


def test_default_tokens(sd):
    model = Model(sd)
    probe = SimpleNamespace(prompt="the big red car in blue", subject="red car", occurrence=0)
    sites = model.encoders[0].sites()[:1]
    found = text_lanes(model, probe, sites, "default", Corruption())
    groups = {lane.patches[0].selector.label: lane.patches[0].selector.tokens for lane, _ in found}
    assert groups == {
        "earlier": (0, 1, 2),
        "subject -2": (3,),
        "last subject": (4,),
        "later +1": (5,),
        "later +2": (6,),
        "EOS": (7,),
        "padding": tuple(range(8, 24)),
    }
    chosen = text_lanes(model, probe, sites, ["last subject", 4, 6, "EOS"], Corruption())
    labels = [lane.patches[0].selector.label for lane, _ in chosen]
    assert labels == ["last subject", "token 6 'blue'", "EOS"]
