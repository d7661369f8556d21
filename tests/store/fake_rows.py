"""Rows and pictures that look like a real sweep's, without a model.

Loaded by path from several test folders and from the subprocess that gets killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from fasttrace.types import Row

PROMPTS = {
    "object": [
        ("a photo of a red apple on a table", "apple"),
        ("a small dog in the park", "dog"),
        ("a boat on a lake at dawn", "boat"),
        ("an old clock on a wall", "clock"),
        ("a lamp beside a green sofa", "lamp"),
        ("a bicycle in the rain", "bicycle"),
    ],
    "style": [
        ("a house in the style of van gogh", "van gogh"),
        ("a harbour in the style of monet", "monet"),
        ("a woman in the style of picasso", "picasso"),
        ("a forest, pixel art", "pixel art"),
        ("a tower, pencil sketch", "pencil sketch"),
        ("a field, watercolour", "watercolour"),
    ],
    "colour": [
        ("a blue car in a street", "blue"),
        ("a yellow bird on a branch", "yellow"),
        ("a green bottle", "green"),
        ("a purple hat on a chair", "purple"),
        ("a white cat", "white"),
        ("an orange umbrella", "orange"),
    ],
    "action": [
        ("a man running on a beach", "running"),
        ("a girl reading a book", "reading"),
        ("a horse jumping over a fence", "jumping"),
        ("a cook chopping onions", "chopping"),
        ("a boy sleeping in a chair", "sleeping"),
        ("two people dancing", "dancing"),
    ],
}
# attribute -> [(part of a site's name, how much of the concept it holds)]
STRENGTHS = {
    "object": [("mid_block", 0.55), ("down_blocks.2", 0.4), ("up_blocks.1", 0.5)],
    "style": [("up_blocks.2", 0.35), ("up_blocks.1.attentions", 0.6), ("down_blocks.1", 0.2)],
    "colour": [("up_blocks.3", 0.55), ("down_blocks.0", 0.35), ("up_blocks.2.resnets", 0.3)],
    "action": [("down_blocks.2.attentions", 0.5), ("mid_block.attentions", 0.6)],
}
TOKENS = ("last subject", "later tokens", "EOS", "padding")
SAMPLING = {"steps": 20, "guidance": 7.5, "height": 64, "width": 64, "scheduler": "DDIMScheduler"}
CORRUPTION = {"kind": "embedding_noise", "scale": 3.0, "sigma": 0.41, "seed": 0}
VERSIONS = {"fasttrace": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "python": "3.12.4"}
FLOOR = 2e-4


def unet_sites() -> list[tuple[str, str]]:
    """(name, kind) of SD 1.x's 70 sites in execution order."""
    sites: list[tuple[str, str]] = []

    def block(path: str, count: int, attention: bool) -> None:
        for j in range(count):
            sites.append((f"unet.{path}.resnets.{j}", "resnet"))
            if attention:
                transformer = f"unet.{path}.attentions.{j}.transformer_blocks.0"
                sites.extend((f"{transformer}.{kind}", kind) for kind in ("attn1", "attn2", "ff"))

    for i in range(4):
        block(f"down_blocks.{i}", 2, i < 3)
    block("mid_block", 1, True)
    sites.append(("unet.mid_block.resnets.1", "resnet"))
    for i in range(4):
        block(f"up_blocks.{i}", 3, i > 0)
    return sites


def text_sites(layers: int = 12) -> list[tuple[str, str]]:
    sites: list[tuple[str, str]] = []
    for layer in range(layers):
        path = f"text_encoder.layers.{layer}"
        sites += [(f"{path}.self_attn", "attn"), (f"{path}.mlp", "mlp"), (path, "hidden")]
    return sites


def _share(attribute: str, site: str, kind: str, selector: str) -> float:
    if site.startswith("unet"):
        base = sum(share for part, share in STRENGTHS.get(attribute, []) if part in site)
        return base * {"resnet": 0.6, "attn1": 0.5, "attn2": 1.0, "ff": 0.8}[kind]
    layer = int(site.split(".")[2])
    token = {"last subject": 1.0, "EOS": 0.5, "padding": 0.7}.get(selector, 0.15)
    if kind == "hidden":
        return min(1.0, token * (1.0 - layer / 16 if selector == "last subject" else layer / 12))
    return token * (0.9 if layer == 0 and kind == "attn" else 0.08)


def _row(
    attribute: str,
    prompt: str,
    subject: str,
    seed: int,
    index: int,
    site: str,
    kind: str,
    selector: str,
    component: str,
) -> Row:
    pair = hashlib.sha256(f"{prompt}|{subject}|{seed}".encode()).hexdigest()[:16]
    key = hashlib.sha256(f"{pair}|{site}|{selector}".encode()).hexdigest()
    rng = np.random.default_rng(int(key[:12], 16))
    pair_rng = np.random.default_rng(int(pair[:12], 16))
    corrupt = 18.0 + 2.0 * float(pair_rng.random())
    total = 6.0 + 4.0 * float(pair_rng.random())
    if subject in ("clock", "white"):
        total = 0.00015  # a pair whose clean picture never showed the subject
    share = _share(attribute, site, kind, selector) * (0.8 + 0.4 * float(pair_rng.random()))
    effect = total * share + 0.35 * float(rng.standard_normal())
    unreachable = component == "text_encoder" and selector == "later tokens" and "11" in site
    if unreachable:
        effect = 0.0
    return Row(
        key=key, model="fake", fingerprint="f" * 64, component=component, attribute=attribute,
        prompt=prompt, subject=subject, occurrence=0, negative_prompt="", seed=seed, site=site,
        site_index=index, kind=kind, selector=selector,
        tokens=None if selector == "all" else (5, 6), branch="cond", window_start=0,
        window_stop=20, corruption=json.dumps(CORRUPTION), sampling=json.dumps(SAMPLING),
        metric="clip_score", score=corrupt + effect, clean_score=corrupt + total,
        corrupt_score=corrupt, total_effect=total, effect=effect,
        normalised_effect=effect / total, noise_floor=FLOOR, engine="reference",
        status="unreachable" if unreachable else "run", picture=f"{pair}_{key[:16]}",
        versions=json.dumps(VERSIONS),
    )  # fmt: skip


def fake_sweep(
    attributes: Sequence[str] = ("object", "style", "colour", "action"),
    prompts: int = 3,
    seeds: Sequence[int] = (0,),
    components: Sequence[str] = ("unet", "text_encoder"),
) -> Iterator[Row]:
    """Rows in a plan's order: probe, seed, site."""
    for component in components:
        unet = component == "unet"
        sites = unet_sites() if unet else text_sites()
        for attribute in attributes:
            for prompt, subject in PROMPTS[attribute][:prompts]:
                for seed in seeds:
                    for index, (site, kind) in enumerate(sites):
                        for selector in ("all",) if unet else TOKENS:
                            yield _row(
                                attribute, prompt, subject, seed, index, site, kind, selector,
                                component,
                            )  # fmt: skip


def fake_picture(row: Row, share: float, size: int = 64) -> np.ndarray:
    """[3,H,W] in [0,1]: a scene whose subject shows as much as `share` says."""
    rng = np.random.default_rng(int(hashlib.sha256(row.prompt.encode()).hexdigest()[:12], 16))
    y, x = np.mgrid[0:size, 0:size] / size
    sky, ground, colour = rng.random(3) * 0.4 + 0.5, rng.random(3) * 0.5, rng.random(3)
    scene = np.where((y > 0.62)[None], ground[:, None, None], sky[:, None, None] - 0.3 * y)
    cx, cy, radius = 0.3 + 0.4 * rng.random(), 0.45 + 0.2 * rng.random(), 0.17 + 0.08 * rng.random()
    inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
    if rng.random() < 0.5:
        inside = (abs(x - cx) < radius) & (abs(y - cy) < 0.8 * radius)
    shade = colour[:, None, None] * (0.75 + 0.5 * (cy - y))
    weight = np.clip(share, 0.0, 1.0) * inside
    return np.clip(scene * (1 - weight) + shade * weight, 0, 1).astype(np.float32)


def fake_pictures(row: Row) -> dict[str, np.ndarray]:
    """The row's own picture and its pair's two, under the names the rows use."""
    assert row.picture is not None
    pair = row.picture.rsplit("_", 1)[0]
    return {
        row.picture: fake_picture(row, row.effect / max(row.total_effect, 1.0)),
        f"{pair}_clean": fake_picture(row, 1.0),
        f"{pair}_corrupt": fake_picture(row, 0.0),
    }
