"""How a subject is destroyed: sizes, seeds, and what stays untouched."""

import pytest
import torch

from fasttrace.adapters.corruption import corrupt_text, resolve
from fasttrace.adapters.hooks import watching
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.text import encode_cond
from fasttrace.types import Corruption, Probe

PROBES = [Probe("a photo of a dog", "dog"), Probe("a red car in the house", "red car")]


def texts(tiny, probe, corruption):
    model = Model(tiny)
    with scope(tiny):
        clean = model.text(probe.prompt, "", guided=True)
        return clean, corrupt_text(model, probe, resolve(model, [probe], corruption), clean)


def test_sigma_is_three_times_the_spread_of_the_subjects_rows(tiny):
    model = Model(tiny)
    sigma = resolve(model, PROBES, Corruption()).sigma
    sigmas = sigma if isinstance(sigma, tuple) else (sigma,)
    assert len(sigmas) == len(model.encoders)
    for encoder, found in zip(model.encoders, sigmas, strict=True):
        ids = [encoder.tokenizer(w).input_ids[1:-1] for w in ("dog", "red car")]
        rows = encoder.word_embedding.weight.detach()[[i for group in ids for i in group]]
        assert rows.shape == (3, 16)
        expected = 3 * float(rows.double().var(correction=0) ** 0.5)
        assert found == pytest.approx(expected, rel=1e-6)


def test_embedding_noise_is_what_it_says(tiny, probe):
    """On the subject's rows, of the given size, the same every time."""
    model = Model(tiny)
    corruption = Corruption(sigma=2.0, seed=5)
    encoder = model.encoders[0]
    seen = []
    with scope(tiny):
        clean = model.text(probe.prompt, "", guided=True)
        for _ in range(2):
            with watching({"": encoder.core.embeddings}, lambda _, out: seen.append(out)):
                corrupt_text(model, probe, corruption, clean)
        with watching({"": encoder.core.embeddings}, lambda _, out: seen.append(out)):
            encode_cond(tiny, probe.prompt, model.device)
    assert torch.equal(seen[0], seen[1])
    change = (seen[0] - seen[2])[0]
    span = encoder.span(probe.prompt, "dog")
    inside = change[span.start : span.stop]
    assert not change[: span.start].any()
    assert not change[span.stop :].any()
    assert 1.0 < float(inside.std()) < 3.0


@pytest.mark.parametrize(
    "corruption",
    [
        Corruption(),
        Corruption("output_noise"),
        Corruption("replace", replacement="cat"),
        Corruption("replace", replacement="a big blue house"),
    ],
    ids=lambda c: c.kind,
)
def test_every_kind_changes_the_conditional_text_alone(tiny, probe, corruption):
    clean, corrupt = texts(tiny, probe, corruption)
    assert corrupt.uncond is clean.uncond
    assert corrupt.uncond_pooled is clean.uncond_pooled
    span = Model(tiny).encoders[0].span(probe.prompt, "dog")
    same = (clean.cond == corrupt.cond).all(-1)[0]
    assert same[: span.start].all()  # causal: nothing before the subject moves
    assert not same[span.start]
    if clean.pooled is not None:
        assert not torch.equal(clean.pooled, corrupt.pooled)
    if corruption.kind == "output_noise":
        assert same[span.stop :].all()


def test_replace_is_the_other_prompt(tiny, probe):
    _, corrupt = texts(tiny, probe, Corruption("replace", replacement="cat"))
    with scope(tiny):
        other = Model(tiny).text("a photo of a cat in the house", "", guided=True)
    assert torch.equal(corrupt.cond, other.cond)


def test_seed_and_prompt_fix_the_noise(sd, probe):
    first = texts(sd, probe, Corruption(seed=1))[1].cond
    assert torch.equal(first, texts(sd, probe, Corruption(seed=1))[1].cond)
    assert not torch.equal(first, texts(sd, probe, Corruption(seed=2))[1].cond)
    other = Probe("a photo of a dog in a house", "dog")
    model = Model(sd)
    rows = []
    embeddings = {"": model.encoders[0].core.embeddings}
    for one in (probe, other):
        with scope(sd), watching(embeddings, lambda _, out: rows.append(out[0, 5])):
            corrupt_text(model, one, Corruption(sigma=1.0), model.text(one.prompt, "", False))
    # the subject stands at position 5: clean, then noisy, of either prompt
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[1], rows[3])


def test_zero_sigma_is_the_clean_run(tiny, probe):
    clean, corrupt = texts(tiny, probe, Corruption(sigma=0.0))
    assert torch.equal(clean.cond, corrupt.cond)
