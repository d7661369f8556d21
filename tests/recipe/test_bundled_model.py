"""The bundled model is what its card says."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fasttrace.embedded.classifier import load_classifier
from recipe.card import TARGETS, TEMPLATE
from recipe.data import World
from recipe.evaluate import GUIDANCE, STEPS, generate, load_pipeline, sample_captions
from recipe.train_classifiers import accuracy, targets
from recipe.training import EMBEDDED

ROOT = Path(__file__).parents[2]


def test_the_weights_are_small_and_none_is_a_pickle():
    files = [f for f in EMBEDDED.rglob("*") if f.is_file()]
    weights = [f for f in files if f.suffix == ".safetensors"]
    assert len(weights) == 5
    assert sum(f.stat().st_size for f in weights) < 40e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_plain_diffusers_opens_it():
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED / "model", local_files_only=True)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert pipe.text_encoder.config.num_hidden_layers >= 6
    assert pipe.unet.config.sample_size == 16
    assert pipe.vae.config.latent_channels == 4


@pytest.mark.parametrize("card", [EMBEDDED / "README.md", TEMPLATE])
def test_the_example_of_the_card_runs(card, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    exec(code.format(steps=STEPS, guidance=GUIDANCE), found := {})
    assert found["pipe"].dtype == torch.float32


def test_the_classifiers_know_real_pictures_of_unseen_combinations():
    found = accuracy(load_classifier(EMBEDDED / "classifiers"), World(77, held_out=True), 600)
    assert min(found.values()) >= 0.97, found


def test_the_card_quotes_what_was_measured():
    record = json.loads((EMBEDDED / "quality.json").read_text())
    card = (EMBEDDED / "README.md").read_text()
    assert (record["steps"], record["guidance"]) == (STEPS, GUIDANCE)
    for attribute, target in TARGETS.items():
        share = 100 * record["generated"][attribute]
        mark = "" if share >= target else " (missed)"
        assert f"| {attribute} | {share:.1f} %{mark} | {target} %" in card


def test_a_fresh_sample_agrees_with_the_measured_quality():
    """64 new captions; the band is four standard errors of a share measured on so few."""
    record = json.loads((EMBEDDED / "quality.json").read_text())["generated"]
    scenes, texts = sample_captions(64, seed=99)
    judge = load_classifier(EMBEDDED / "classifiers")
    with torch.no_grad():
        found = judge.probabilities(generate(load_pipeline(), texts, seed=500_000))
    person = torch.tensor([s.action is not None for s in scenes])
    for attribute, truth in targets(scenes).items():
        right = (found[attribute].argmax(1) == truth).float()
        judged = {"object": ~person, "action": person}.get(attribute, torch.ones_like(person))
        share, expected = right[judged].mean().item(), record[attribute]
        error = (max(expected * (1 - expected), 0.02) / int(judged.sum())) ** 0.5
        assert share == pytest.approx(expected, abs=4 * error), attribute
