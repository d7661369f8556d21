"""The CLIP score against transformers' own model, and its gradient."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel

from fasttrace.errors import ModelError
from fasttrace.metrics.clip import ClipScorer, _features
from fasttrace.types import MetricContext, Probe

CPU = torch.device("cpu")
CONTEXT = MetricContext(Probe("a photo of a dog", "dog"))


@pytest.fixture(scope="module")
def scorer(folders):
    return ClipScorer(folders["clip"], CPU)


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_score_is_the_cosine_of_the_models_own_embeddings(scorer, folders, pictures):
    model = CLIPModel.from_pretrained(folders["clip"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["clip"])
    text = tokenizer([CONTEXT.probe.prompt], padding="max_length", return_tensors="pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        out = model(**text, pixel_values=(pictures - mean) / std)
    expected = 100 * F.cosine_similarity(out.image_embeds, out.text_embeds)
    torch.testing.assert_close(scorer.clip_score(pictures, CONTEXT), expected)


def test_picture_similarity(scorer, pictures):
    context = MetricContext(CONTEXT.probe, clean_picture=pictures[:1])
    found = scorer.similarity(pictures, context)
    assert float(found[0]) == pytest.approx(100, abs=1e-4)
    assert (found[1:] < 100).all()
    with pytest.raises(ModelError, match="clean run's picture"):
        scorer.similarity(pictures, CONTEXT)


def test_gradient_reaches_the_pictures(scorer, pictures):
    pictures.requires_grad_(True)
    scorer.clip_score(pictures, CONTEXT).sum().backward()
    assert (pictures.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (40, 24), (8, 8)])
def test_any_size_is_prepared(scorer, size):
    flat = torch.full((1, 3, *size), 0.25)
    ready = scorer.prepare(flat)
    assert ready.shape == (1, 3, 16, 16)
    torch.testing.assert_close(ready * scorer.std + scorer.mean, torch.full_like(ready, 0.25))


def test_centre_is_kept(scorer):
    wide = torch.zeros(1, 3, 16, 48)
    wide[..., 16:32] = 1
    assert float((scorer.prepare(wide) * scorer.std + scorer.mean).mean()) > 0.99


def test_long_texts_are_cut(scorer, pictures):
    context = MetricContext(Probe("dog " * 100, "dog"))
    assert torch.isfinite(scorer.clip_score(pictures, context)).all()


def test_features_may_be_a_tensor_or_an_output():
    vector = torch.ones(1, 2)
    assert _features(vector) is vector
    assert _features(SimpleNamespace(pooler_output=vector)) is vector


def test_scorers_leave_no_gradients_and_have_a_fingerprint(scorer):
    assert not any(p.requires_grad for p in scorer.model.parameters())
    assert len(scorer.fingerprint) == 64
