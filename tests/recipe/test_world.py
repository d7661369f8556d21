"""The emoji world: grammar, split, drawing."""

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch

from recipe.data import World, load_tokenizer
from recipe.train_clip import truth
from recipe.world import (
    ACTIONS,
    ARCHIVE,
    DEFAULT_GROUND,
    GROUNDS,
    OBJECTS,
    STYLES,
    Scene,
    all_captions,
    all_scenes,
    caption,
    draw,
    draw_jittered,
    is_held_out,
)


def test_size_of_the_world():
    assert len(OBJECTS) >= 60
    assert {"dog", "cat", "apple", "car", "house", "rocket"} <= set(OBJECTS)
    assert len(STYLES) == 4
    assert len(GROUNDS) >= 6
    assert len(ACTIONS) >= 8
    assert len(set(all_scenes())) == len(all_scenes()) == (71 + 12) * 4 * 9


def test_the_grammar_has_bare_captions_and_right_articles():
    captions = all_captions()
    assert "a dog" in captions
    assert "an owl in ink style on an orange ground" in captions
    assert "an ink drawing of grapes on blue" in captions
    assert not [c for c in captions if " a orange" in c or c.startswith("a ink")]


def test_captions_are_true():
    rng = np.random.default_rng(0)
    for scene in all_scenes()[::37]:
        for _ in range(5):
            text = caption(scene, rng)
            words = set(text.split())
            assert scene.noun in text
            assert words & set(STYLES) <= {scene.style}
            said = words & set(GROUNDS)
            assert said == {scene.ground} or (not said and scene.ground == DEFAULT_GROUND)


def test_held_out_scenes_hide_combinations_but_no_pair():
    scenes = all_scenes()
    held_out = [s for s in scenes if is_held_out(s)]
    trained = [s for s in scenes if not is_held_out(s)]
    assert len(held_out) == len(scenes) // 9

    def pairs(of):
        subject = [s.object or s.action for s in of]
        return {
            *zip(subject, (s.style for s in of), strict=True),
            *zip(subject, (s.ground for s in of), strict=True),
            *((s.style, s.ground) for s in of),
        }

    assert pairs(held_out) <= pairs(trained)
    assert {s.ground for s in held_out} == set(GROUNDS)


def test_the_sprites_are_those_of_the_manifest():
    with zipfile.ZipFile(ARCHIVE) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert len(manifest["sprites"]) == len(STYLES) * (len(OBJECTS) + len(ACTIONS))
        for name, digest in manifest["sprites"].items():
            assert hashlib.sha256(archive.read(f"{name}.png")).hexdigest() == digest
        assert {p["licence"].split(",")[0] for p in manifest["packages"].values()} == {
            "MIT",
            "Apache-2.0",
        }


def test_drawing():
    picture = draw(Scene("flat", "red", object="apple"))
    assert picture.shape == (3, 64, 64)
    assert picture.dtype == np.float32
    np.testing.assert_allclose(picture[:, 0, 0], np.array(GROUNDS["red"]) / 255, rtol=1e-6)
    assert 0 <= picture.min() <= picture.max() <= 1
    moved = draw(Scene("flat", "red", object="apple"), dx=2)
    np.testing.assert_array_equal(picture[:, :, 10:50], moved[:, :, 12:52])
    first = draw_jittered(Scene("ink", "blue", action="biking"), np.random.default_rng(3))
    again = draw_jittered(Scene("ink", "blue", action="biking"), np.random.default_rng(3))
    np.testing.assert_array_equal(first, again)


def test_a_third_of_the_subjects_take_several_tokens():
    tokenizer = load_tokenizer()
    assert 300 <= len(tokenizer) <= 600
    subjects = [*OBJECTS, *ACTIONS, *STYLES, *GROUNDS]
    counts = [len(tokenizer.tokenize(s)) for s in subjects]
    assert sum(n in (2, 3) for n in counts) >= len(subjects) / 3


@pytest.mark.parametrize("text", ["a dog, 2 cats: what's that?", "A DOG ON A RED GROUND!"])
def test_marks_and_digits_are_tokens_of_their_own(text):
    tokenizer = load_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.eos_token_id) == 1


def test_every_caption_fits_the_window():
    world = World(0)
    ids = world.ids(all_captions()[::50])
    assert (ids[:, -1] == world.tokenizer.eos_token_id).all()


def test_truth_of_captions():
    dog, cat = Scene("flat", "red", object="dog"), Scene("ink", "white", object="cat")
    texts = ["a dog on a red ground", "a cat", "a dog in ink style on a red ground"]
    assert truth([dog, cat, dog], texts).tolist() == [
        [True, False, True],
        [False, True, False],
        [False, False, False],
    ]


def test_pictures_of_a_batch():
    world = World(0)
    scenes = world.batch_scenes(5)
    pictures = world.pictures(scenes)
    assert pictures.shape == (5, 3, 64, 64)
    assert pictures.dtype == torch.float32
    assert not any(is_held_out(s) for s in scenes)
