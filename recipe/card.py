"""Measure the bundled model and write its card: `python -m recipe.card [--captions 500]`.

Writes `quality.json`, `sheet.png` and `README.md` into `fasttrace/embedded/`. Every number of the
card was measured by this run or is recorded in `progress.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open

from fasttrace.embedded.classifier import load_classifier
from recipe.data import World, load_tokenizer
from recipe.evaluate import GUIDANCE, STEPS, quality, sheet
from recipe.train_classifiers import accuracy
from recipe.training import EMBEDDED, PROGRESS
from recipe.world import ACTIONS, ARCHIVE, GROUNDS, OBJECTS, STYLES

TEMPLATE = Path(__file__).parent / "card.md"
TARGETS = {"object": 85, "style": 95, "colour": 85, "action": 70}


def parameters(file) -> int:
    with safe_open(file, "pt") as weights:
        return sum(weights.get_tensor(k).numel() for k in weights.keys())  # noqa: SIM118


def parts() -> list[str]:
    progress = json.loads(PROGRESS.read_text())
    files = {
        "text encoder": ("model/text_encoder/model.safetensors", "clip_text", "CLIP, then frozen"),
        "autoencoder": ("model/vae/diffusion_pytorch_model.safetensors", "vae", "64x64 to 16x16x4"),
        "denoiser": ("model/unet/diffusion_pytorch_model.safetensors", "unet", "v-prediction"),
        "score": ("score/model.safetensors", "clip_score", "an independent CLIP, other seed"),
        "classifiers": ("classifiers/model.safetensors", "classifiers", "one trunk, four heads"),
    }
    rows = []
    for part, (file, stage, what) in files.items():
        count = parameters(EMBEDDED / file) / 1e6
        seen = progress[stage]
        trained = f"{seen['views']:,} pictures, {seen['minutes']:.0f} min on two cores"
        rows.append(f"| {part} | {what} | {count:.2f} M | {trained}; {seen['evaluation']} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", type=int, default=500)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    real = accuracy(load_classifier(EMBEDDED / "classifiers"), World(999, held_out=True), 2000)
    made = quality(args.captions)
    record = {
        "captions": args.captions,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "generated": made,
        "classifiers_on_real_renders": real,
    }
    (EMBEDDED / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    sheet(str(EMBEDDED / "sheet.png"))
    rows = []
    for attribute, target in TARGETS.items():
        share = 100 * made[attribute]
        mark = "" if share >= target else " (missed)"
        unseen = 100 * made[f"{attribute} (unseen combinations)"]
        rows.append(
            f"| {attribute} | {share:.1f} %{mark} | {target} % | {unseen:.1f} % "
            f"| {100 * real[attribute]:.1f} % |"
        )
    tokenizer = load_tokenizer()
    subjects = [*OBJECTS, *ACTIONS, *STYLES, *GROUNDS]
    multi = sum(len(tokenizer.tokenize(s)) > 1 for s in subjects)
    weights = sum(f.stat().st_size for f in EMBEDDED.rglob("*.safetensors"))
    packages = "`@iconify-json/fluent-emoji`, `-flat`, `-high-contrast` (MIT, Microsoft)"
    card = TEMPLATE.read_text().format(
        steps=STEPS,
        guidance=GUIDANCE,
        objects=len(OBJECTS),
        actions=len(ACTIONS),
        styles=len(STYLES),
        style_names=", ".join(STYLES),
        grounds=len(GROUNDS),
        ground_names=", ".join(GROUNDS),
        multi=multi,
        subjects=len(subjects),
        share=100 * multi / len(subjects),
        captions=args.captions,
        quality_rows="\n".join(rows),
        part_rows="\n".join(parts()),
        megabytes=weights / 1e6,
        sprites_sha=hashlib.sha256(ARCHIVE.read_bytes()).hexdigest(),
        packages=f"{packages} and `@iconify-json/noto` (Apache-2.0, Google)",
    )
    (EMBEDDED / "README.md").write_text(card)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
