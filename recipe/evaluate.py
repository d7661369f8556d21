"""Measure the bundled model: `python -m recipe.evaluate [--captions 500] [--sheet FILE]`.

Half of the captions name combinations never trained on. The judges are the committed classifiers,
whose own accuracy on real renders of unseen combinations is measured first.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fasttrace.embedded.classifier import load_classifier
from recipe.data import World
from recipe.train_classifiers import accuracy, targets
from recipe.training import EMBEDDED
from recipe.world import FULL, Scene, sentence

STEPS, GUIDANCE = 12, 3.0


def load_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        EMBEDDED / "model", dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: StableDiffusionPipeline,
    captions: list[str],
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """[captions, 3, 64, 64] in [0, 1]; picture i has its own generator, seeded seed + i."""
    out = []
    for start in range(0, len(captions), 64):
        part = captions[start : start + 64]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        pictures = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        out.append(pictures)
    return torch.cat(out)


def sample_captions(n: int, seed: int) -> tuple[list[Scene], list[str]]:
    """`n` scenes, half of them held out, each with a caption that names style and ground.

    A third are persons doing something, so that actions are judged on enough pictures.
    """
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    for held_out in (False, True):
        pool = World(0, held_out=held_out).scenes
        objects = [s for s in pool if s.object]
        actions = [s for s in pool if s.action]
        for i in range(n // 2):
            pick = actions if i % 3 == 0 else objects
            scenes.append(pick[rng.integers(len(pick))])
    return scenes, [sentence(FULL, s) for s in scenes]


def quality(captions: int = 500, seed: int = 1, guidance: float = GUIDANCE) -> dict[str, float]:
    """Attribute -> share of generated pictures that show what the caption says."""
    scenes, texts = sample_captions(captions, seed)
    judge = load_classifier(EMBEDDED / "classifiers")
    with torch.no_grad():
        found = judge.probabilities(
            generate(load_pipeline(), texts, seed=10_000, guidance=guidance)
        )
    person = torch.tensor([s.action is not None for s in scenes])
    unseen = torch.arange(len(scenes)) >= len(scenes) // 2
    out = {}
    for attribute, truth in targets(scenes).items():
        right = (found[attribute].argmax(1) == truth).float()
        judged = {"object": ~person, "action": person}.get(attribute, torch.ones_like(person))
        out[attribute] = right[judged].mean().item()
        out[f"{attribute} (unseen combinations)"] = right[judged & unseen].mean().item()
    return out


def sheet(file: str, seed: int = 3) -> None:
    """A picture sheet: every subject once, styles and grounds in turn."""
    from recipe.world import ACTIONS, GROUNDS, OBJECTS, STYLES

    styles, grounds = list(STYLES), list(GROUNDS)
    scenes = [
        Scene(styles[i % 4], grounds[(2 * i) % 9], object=o) for i, o in enumerate(OBJECTS)
    ] + [Scene(styles[i % 4], grounds[(2 * i) % 9], action=a) for i, a in enumerate(ACTIONS)]
    texts = [sentence(FULL, s) for s in scenes]
    pictures = generate(load_pipeline(), texts, seed)
    columns = 12
    blank = torch.ones(-len(pictures) % columns, *pictures.shape[1:])
    rows = torch.cat([pictures, blank]).unflatten(0, (-1, columns))
    image = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((image.numpy() * 255).round().astype(np.uint8)).save(file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sheet")
    args = parser.parse_args()
    judge = load_classifier(EMBEDDED / "classifiers")
    report = {
        "classifiers on real renders of unseen combinations": accuracy(
            judge, World(999, held_out=True), 2000
        ),
        "generated": quality(args.captions, guidance=args.guidance),
        "settings": {"captions": args.captions, "steps": STEPS, "guidance": args.guidance},
    }
    print(json.dumps(report, indent=1))
    if args.sheet:
        sheet(args.sheet)


if __name__ == "__main__":
    main()
