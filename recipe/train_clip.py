"""Train a CLIP: `python -m recipe.train_clip text` (the pipeline's encoder) or `score` (the judge).

The two share nothing but the pictures: other seed, other width. The loss is CLIP's, with every true
caption of a picture counted as a positive (two captions of one batch may both be true of it).
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from recipe.data import WINDOW, World
from recipe.training import EMBEDDED, WORK, arguments, load_state, train
from recipe.world import FULL, GROUNDS, STYLES, Scene, sentence

SIZES = {  # text width, text layers, vision width, vision layers, heads, patch, seed
    "text": (192, 6, 192, 5, 4, 16, 1),
    "score": (128, 4, 128, 4, 4, 8, 2),
}


def build(which: str, tokenizer) -> CLIPModel:
    text_width, text_layers, vision_width, vision_layers, heads, patch, seed = SIZES[which]
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": heads,
            "max_position_embeddings": WINDOW,
            "projection_dim": 128,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 4 * vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": heads,
            "image_size": 64,
            "patch_size": patch,
            "projection_dim": 128,
        },
        projection_dim=128,
    )
    return CLIPModel(config)


def truth(scenes: list[Scene], texts: list[str]) -> torch.Tensor:
    """[B texts, B pictures] bool: is the text true of the picture?"""
    nouns = {noun: i for i, noun in enumerate(sorted({s.noun for s in scenes}))}
    styles, grounds = list(STYLES), list(GROUNDS)
    words = [text.split() for text in texts]

    def said(names: list[str], default: int) -> torch.Tensor:
        found = [next((names.index(w) for w in ws if w in names), default) for ws in words]
        return torch.tensor(found)[:, None]

    def drawn(values: list[int]) -> torch.Tensor:
        return torch.tensor(values)[None]

    noun = drawn([nouns[s.noun] for s in scenes])
    style, said_style = drawn([styles.index(s.style) for s in scenes]), said(styles, -1)
    ground, said_ground = drawn([grounds.index(s.ground) for s in scenes]), said(grounds, 0)
    return (noun == noun.T) & ((said_style == -1) | (said_style == style)) & (said_ground == ground)


def features(model: CLIPModel, ids: torch.Tensor, pictures: torch.Tensor):
    """Unit vectors ([B, 128], [B, 128]) of texts and pictures; pictures in [0, 1]."""
    out = model(input_ids=ids, pixel_values=pictures * 2 - 1)
    return out.text_embeds, out.image_embeds


def main() -> None:
    which = sys.argv.pop(1)
    args = arguments(minutes=9, batch=128, lr=1e-3)
    world, unseen = World(args.seed), World(1, held_out=True)
    model = build(which, world.tokenizer)
    model.set_attn_implementation("eager")  # the fused CPU backward is slower at these sizes
    views = load_state(WORK / f"clip_{which}.safetensors", model)

    def loss_of_batch(n: int) -> torch.Tensor:
        scenes = world.batch_scenes(n)
        texts = world.captions(scenes)
        pictures = world.pictures(scenes)
        # the judge must also read pictures that a decoder has blurred or a sampler left noisy
        if world.rng.random() < 0.5:
            pictures = F.avg_pool2d(pictures, 3, 1, 1)
        pictures = pictures + 0.03 * float(world.rng.random()) * torch.randn_like(pictures)
        text, image = features(model, world.ids(texts), pictures)
        logits = text.float() @ image.float().T * model.logit_scale.exp().clamp(max=100)
        target = truth(scenes, texts).float()
        by_text = -(target * logits.log_softmax(1)).sum(1) / target.sum(1)
        by_image = -(target * logits.log_softmax(0)).sum(0) / target.sum(0)
        return (by_text.mean() + by_image.mean()) / 2

    @torch.no_grad()
    def evaluate(m: CLIPModel) -> str:
        scenes = unseen.batch_scenes(300)
        texts = [sentence(FULL, s) for s in scenes]
        text, image = features(m, unseen.ids(texts), unseen.pictures(scenes))
        best = (image @ text.T).argmax(1)
        right = sum(texts[b] == t for b, t in zip(best.tolist(), texts, strict=True))
        return f"picture -> caption among 300 unseen combinations: {right / 3:.1f} %"

    average = train(
        f"clip_{which}", model, loss_of_batch, args, evaluate, evaluate_every=150, views=views
    )
    if which == "text":
        from transformers import CLIPTextModel

        text_model = CLIPTextModel(average.config.text_config)
        source = {
            k.removeprefix("text_model."): v
            for k, v in average.state_dict().items()
            if k.startswith("text_model.")
        }
        target = text_model.state_dict()
        prefix = "text_model." if any(k.startswith("text_model.") for k in target) else ""
        text_model.load_state_dict({prefix + k: v for k, v in source.items()})
        text_model.half().save_pretrained(EMBEDDED / "model" / "text_encoder")
    else:
        average.half().save_pretrained(EMBEDDED / "score")
        world.tokenizer.save_pretrained(EMBEDDED / "score")
        statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 64}
        (EMBEDDED / "score" / "preprocessor_config.json").write_text(json.dumps(statistics) + "\n")


if __name__ == "__main__":
    main()
