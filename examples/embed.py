"""Embed the engine: the user's own pipeline, rows as they come, a metric, progress, pictures.

Written cell by cell, as in a notebook. Run it: python examples/embed.py [FOLDER]
"""

# %% A pipeline, as diffusers loads it. fasttrace neither moves nor copies its weights.
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fasttrace

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "embed-out")
OUT.mkdir(parents=True, exist_ok=True)
pipe = fasttrace.load("embedded")  # yours: StableDiffusionPipeline.from_pretrained(...)
tracer = fasttrace.Tracer(pipe)

# %% What to ask: data, as another tool may send it.
PLAN = {
    "probes": [{"prompt": "a dog in ink style on a green ground", "subject": "a dog"}],
    "sites": ["attn2"],
    "seeds": [0, 1],
    "steps": 10,
}
request = fasttrace.parse_plan(PLAN | {"metrics": ["clip_score"]})
print("plan", request.digest()[:12])


# %% A metric of one's own is a callable: pictures [B, 3, H, W] in [0, 1] -> [B] numbers.
def greenness(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures[:, 1] - pictures[:, ::2].mean(1)).clamp(min=0).mean((1, 2))


# %% Rows arrive while the sweep runs; stop whenever you have seen enough.
steps = 0


def on_step(_pipe, _call, _timestep, about):
    global steps
    steps += about["lanes"]


[probe] = request.probes_and_seeds()
plan = tracer.plan(
    probe, sites=list(request.sites), seeds=[0, 1], steps=10, metric=["clip_score", greenness]
)
effects: dict[str, list[float]] = {}
pictures = {}
for row, found in tracer.iter_rows(plan, callback_on_step_end=on_step, output_type="pil"):
    pictures |= found
    if row.metric == "clip_score":
        effects.setdefault(row.site, []).append(row.effect)
        best = row
print(f"{plan.total} rows from {steps} denoiser rows; {len(pictures)} pictures")

# %% The same from the plan as data: the same rows, by key.
keys = {row.key for row, _ in tracer.run(request, pictures=False)}
assert keys == {row.key for row in plan.rows if row.metric == "clip_score"}

# %% A picture of it.
names = sorted(effects, key=lambda site: sum(effects[site]))
figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
axis.barh([n.removeprefix("unet.") for n in names], [sum(effects[n]) / 2 for n in names])
axis.set_xlabel("effect of restoring the site: CLIP score, mean over two seeds")
axis.tick_params(axis="y", labelsize=7)
figure.savefig(OUT / "effects.png", dpi=120)
plt.close(figure)
name = best.picture
pictures[name].save(OUT / "patched.png")
print("wrote", OUT / "effects.png")
