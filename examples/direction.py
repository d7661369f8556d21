"""Steer with a direction, as with a feature of a sparse autoencoder (SAE).

An SAE writes an activation as a sum of features, each a decoder row d times how active it is; to
steer with one is to add amount * d to the activation. Here d is the difference of two means, dogs
minus cats, which needs no training: an SAE's decoder row goes into the same place.
Run it: python examples/direction.py [FOLDER]
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fasttrace

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "direction-out")
OUT.mkdir(parents=True, exist_ok=True)
pipe = fasttrace.load("embedded")
SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
SCENES = ["in flat style on a white ground", "in ink style on a pink ground"]
AMOUNTS = (0.25, 0.5, 0.75, 1.0)

# 1. Activations of both, kept on the disk: a data set that a later run extends.
with fasttrace.record(pipe, SITE, out=OUT / "activations", dtype="float32") as acts:
    for thing in ("a dog", "a cat"):
        acts.run([f"{thing} {scene}" for scene in SCENES], seed=[0, 1, 2])
read = fasttrace.Activations(OUT / "activations")
print(f"{len(read)} samples of {read.fixed['sites'][SITE]}")


def mean_of(thing: str) -> torch.Tensor:
    """[C]: over the samples, the denoiser calls and the places."""
    own = [sample[SITE] for sample in read if sample.about["prompt"].startswith(thing)]
    return torch.stack(own).mean((0, 1, 2))


direction = mean_of("a dog") - mean_of("a cat")

# 2. Add it to a clean run, more and more; the strength of an "add" is its amount.
probe = fasttrace.Probe("a cat in flat style on a white ground", "a cat", "object")
sources = [
    fasttrace.Source("add", values=direction, strength=amount, label=f"dogness x {amount:g}")
    for amount in AMOUNTS
]
tracer = fasttrace.Tracer(pipe)
plan = tracer.plan(
    probe, sites=SITE, source=sources, base="clean", seeds=[7], metric="attribute:object"
)
rows, pictures = [], {}
for row, found in tracer.iter_rows(plan, output_type="pil"):
    rows.append(row)
    pictures |= found
rows.sort(key=lambda row: plan.keys.index(row.key))
print(f"{'unchanged':12} cat {rows[0].clean_score:5.1f} %")
for row in rows:
    print(f"{row.selector:12} cat {row.score:5.1f} %   lost {row.effect:5.1f}")

# 3. A picture of it.
names = [rows[0].picture.rsplit("_", 1)[0] + "_clean", *(row.picture for row in rows)]
titles = ["unchanged", *(row.selector for row in rows)]
figure, axes = plt.subplots(1, len(names), figsize=(2 * len(names), 2.3), layout="constrained")
for axis, name, title in zip(axes, names, titles, strict=True):
    axis.imshow(pictures[name])
    axis.set_title(title, fontsize=9)
    axis.axis("off")
figure.savefig(OUT / "direction.png", dpi=120)
plt.close(figure)
print("wrote", OUT / "direction.png")
