"""The emoji world: which pictures exist, what they are called, and how one is drawn.

A picture is one subject (an object, or a person doing something) in one of four styles, on a ground
of one colour. Captions come from a small grammar, so every attribute of every picture is known.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
ARCHIVE = Path(__file__).parent / "sprites.zip"

# caption word -> package it is drawn from
STYLES = {
    "glossy": "fluent-emoji",
    "flat": "fluent-emoji-flat",
    "ink": "fluent-emoji-high-contrast",
    "cartoon": "noto",
}

GROUNDS = {
    "white": (255, 255, 255),
    "red": (238, 72, 72),
    "orange": (255, 160, 60),
    "yellow": (255, 232, 90),
    "green": (98, 200, 110),
    "blue": (90, 150, 245),
    "purple": (176, 110, 226),
    "pink": (255, 172, 206),
    "gray": (150, 154, 160),
}
DEFAULT_GROUND = "white"  # what a caption without a colour means

# caption noun -> icon name, where the two differ
_OBJECT_WORDS = """
dog cat horse cow pig rabbit elephant penguin owl duck fish turtle snail butterfly octopus whale
crab snake apple=red-apple banana cherries grapes strawberry pineapple carrot mushroom cactus
sunflower tulip palm_tree bread pizza hamburger hot_dog ice_cream doughnut birthday_cake egg
umbrella key hammer scissors guitar trumpet bell alarm_clock light_bulb candle camera teapot
chair top_hat crown teddy_bear car=automobile bus bicycle fire_engine train=locomotive rocket
airplane helicopter sailboat house castle tent snowman robot ghost crescent_moon soccer_ball
"""
_ACTION_WORDS = """
running=person-running biking=person-biking rowing_a_boat=person-rowing-boat
surfing=person-surfing swimming=person-swimming climbing=person-climbing
juggling=person-juggling golfing=person-golfing lifting_weights=person-lifting-weights
dancing=woman-dancing meditating=person-in-lotus-position skiing=skier
"""


def _table(words: str) -> dict[str, str]:
    pairs = (word.split("=") for word in words.split())
    return {p[0].replace("_", " "): p[-1].replace("_", "-") for p in pairs}


OBJECTS = _table(_OBJECT_WORDS)
ACTIONS = _table(_ACTION_WORDS)


@dataclass(frozen=True)
class Scene:
    """One picture of the world. Exactly one of `object` and `action` is set."""

    style: str
    ground: str
    object: str | None = None
    action: str | None = None

    @property
    def noun(self) -> str:
        """The noun phrase: "a dog", "an owl", "a person rowing a boat"."""
        if self.action is not None:
            return f"a person {self.action}"
        assert self.object is not None
        if self.object in ("grapes", "cherries", "scissors", "bread"):
            return self.object
        return f"{'an' if self.object[0] in 'aeiou' else 'a'} {self.object}"

    @property
    def icon(self) -> str:
        return ACTIONS[self.action] if self.action else OBJECTS[self.object or ""]

    @property
    def labels(self) -> dict[str, str]:
        """Attribute -> class, as the classifiers know them."""
        return {
            "object": self.object or "person",
            "style": self.style,
            "colour": self.ground,
            "action": self.action or "none",
        }


def all_scenes() -> list[Scene]:
    """Every subject x style x ground, in a fixed order."""
    subjects = [{"object": o} for o in OBJECTS] + [{"action": a} for a in ACTIONS]
    return [Scene(style=s, ground=g, **sub) for sub in subjects for s in STYLES for g in GROUNDS]


def is_held_out(scene: Scene) -> bool:
    """One subject-style-ground combination in nine is never trained on (its parts are)."""
    subjects = [*OBJECTS, *ACTIONS]
    i = subjects.index(scene.object or scene.action or "")
    return (i + 4 * list(STYLES).index(scene.style)) % len(GROUNDS) == list(GROUNDS).index(
        scene.ground
    )


FULL = "{noun} in {style} style on a {ground} ground"

# A caption may leave the style out (any style) and the ground out (white).
TEMPLATES = {
    (True, True): (
        FULL,
        "{noun} on a {ground} ground in {style} style",
        "a {style} picture of {noun} on a {ground} ground",
        "a {style} drawing of {noun} on {ground}",
    ),
    (True, False): (
        "{noun} in {style} style",
        "a {style} picture of {noun}",
        "a {style} drawing of {noun}",
    ),
    (False, True): ("{noun} on a {ground} ground", "a picture of {noun} on {ground}"),
    (False, False): ("{noun}", "a picture of {noun}", "a drawing of {noun}"),
}


def sentence(template: str, scene: Scene) -> str:
    """Fill a template, with the right article before a vowel."""
    text = template.format(noun=scene.noun, style=scene.style, ground=scene.ground)
    return text.replace("a orange", "an orange").replace("a ink", "an ink")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random caption that is true of `scene`."""
    with_style = rng.random() < 0.75
    with_ground = scene.ground != DEFAULT_GROUND or rng.random() < 0.5
    templates = TEMPLATES[with_style, with_ground]
    template = templates[rng.integers(len(templates))]
    return sentence(template, scene)


def all_captions() -> list[str]:
    """Every sentence of the grammar once; the tokenizer learns from these."""
    out = set()
    for scene in all_scenes():
        for templates in TEMPLATES.values():
            for t in templates:
                out.add(sentence(t, scene))
    return sorted(out)


@cache
def _sprites() -> dict[str, Image.Image]:
    with zipfile.ZipFile(ARCHIVE) as archive:
        names = json.loads(archive.read("manifest.json"))["sprites"]
        return {n: Image.open(io.BytesIO(archive.read(f"{n}.png"))).convert("RGBA") for n in names}


@cache
def _sized(icon: str, style: str, size: int) -> np.ndarray:
    """Premultiplied [size, size, 4] float32 in [0, 1]."""
    pixels = np.asarray(_sprites()[f"{STYLES[style]}/{icon}"], dtype=np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    channels = [
        Image.fromarray(pixels[..., c]).resize((size, size), Image.Resampling.BOX) for c in range(4)
    ]
    return np.stack([np.asarray(c) for c in channels], -1)


def draw(scene: Scene, size: int = 54, dx: int = 0, dy: int = 0) -> np.ndarray:
    """[3, 64, 64] float32 in [0, 1]: the sprite `size` wide, (dx, dy) off the middle."""
    sprite = _sized(scene.icon, scene.style, size)
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = np.asarray(GROUNDS[scene.ground], np.float32) / 255
    top, left = (SIZE - size) // 2 + dy, (SIZE - size) // 2 + dx
    spot = canvas[top : top + size, left : left + size]
    spot[:] = sprite[..., :3] + spot * (1 - sprite[..., 3:])
    return canvas.transpose(2, 0, 1).copy()


def draw_jittered(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """`draw` at a random size of 52-56 pixels, moved by at most 2."""
    size = int(rng.choice((52, 54, 56)))
    dx, dy = (int(v) for v in rng.integers(-2, 3, size=2))
    return draw(scene, size, dx, dy)
