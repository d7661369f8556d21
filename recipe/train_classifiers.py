"""Train the attribute classifiers: `python -m recipe.train_classifiers`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fasttrace.embedded.classifier import AttributeClassifier, save_classifier
from recipe.data import World
from recipe.training import EMBEDDED, WORK, arguments, load_state, train
from recipe.world import ACTIONS, GROUNDS, OBJECTS, STYLES, Scene

CLASSES = {
    "object": [*OBJECTS, "person"],
    "style": list(STYLES),
    "colour": list(GROUNDS),
    "action": [*ACTIONS, "none"],
}


def targets(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Attribute -> [B] class indices."""
    return {
        attribute: torch.tensor([classes.index(s.labels[attribute]) for s in scenes])
        for attribute, classes in CLASSES.items()
    }


def accuracy(model: AttributeClassifier, world: World, n: int = 1000) -> dict[str, float]:
    """Attribute -> share right on fresh real renders; action counts pictures of persons only."""
    scenes = world.batch_scenes(n)
    with torch.no_grad():
        found = model.probabilities(world.pictures(scenes))
    out = {}
    for attribute, truth in targets(scenes).items():
        right = found[attribute].argmax(1) == truth
        if attribute == "action":
            right = right[torch.tensor([s.action is not None for s in scenes])]
        out[attribute] = right.float().mean().item()
    return out


def main() -> None:
    args = arguments(minutes=7, batch=64, lr=2e-3)
    world, unseen = World(args.seed + 200), World(201, held_out=True)
    torch.manual_seed(4)
    model = AttributeClassifier(CLASSES)
    views = load_state(WORK / "classifiers.safetensors", model)

    def loss_of_batch(n: int) -> torch.Tensor:
        scenes = world.batch_scenes(n)
        x = world.pictures(scenes)
        if world.rng.random() < 0.4:  # generated pictures are softer than real ones
            x = F.avg_pool2d(x, 3, 1, 1)
        x = x + 0.05 * float(world.rng.random()) * torch.randn_like(x)
        logits = model(x)
        return sum(
            F.cross_entropy(logits[a].float(), t, label_smoothing=0.02)
            for a, t in targets(scenes).items()
        ) / len(CLASSES)

    def evaluate(m: AttributeClassifier) -> str:
        found = accuracy(m, unseen)
        return "right on unseen combinations: " + ", ".join(
            f"{a} {100 * v:.1f} %" for a, v in found.items()
        )

    average = train("classifiers", model, loss_of_batch, args, evaluate, 120, views=views)
    save_classifier(average, EMBEDDED / "classifiers")


if __name__ == "__main__":
    main()
