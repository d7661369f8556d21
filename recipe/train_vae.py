"""Train the autoencoder, 64x64x3 -> 16x16x4: `python -m recipe.train_vae`.

Once the denoiser has learned its latents, the encoder and the scaling factor stay as they are and
only the decoder learns.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from fasttrace.embedded.classifier import load_classifier
from recipe.data import World
from recipe.training import (
    EMBEDDED,
    WORK,
    arguments,
    load_state,
    seen_so_far,
    train,
    use_plain_attention,
)

FOLDER = EMBEDDED / "model" / "vae"


def build() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences to the right and lower neighbour: what makes a drawing's outline."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def main() -> None:
    args = arguments(minutes=30, batch=16, lr=1e-3)
    use_plain_attention()
    world, unseen = World(args.seed + 100), World(101, held_out=True)
    decoder_only = seen_so_far("unet") > 0
    vae = build()
    views = load_state(WORK / "vae.safetensors", vae)
    if not views and (committed := FOLDER / "diffusion_pytorch_model.safetensors").exists():
        load_state(committed, vae)
        views = seen_so_far("vae")
    if decoder_only:
        scaling = AutoencoderKL.load_config(FOLDER)["scaling_factor"]
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)

    # An early network's view of both pictures: outlines and textures weigh more than flat areas.
    judge = load_classifier(EMBEDDED / "classifiers").trunk
    early, later = judge[:6], judge[6:12]

    def seen(x: torch.Tensor) -> list[torch.Tensor]:
        first = early(x)
        return [first, later(first)]

    def loss_of_batch(n: int) -> torch.Tensor:
        x = world.pictures(world.batch_scenes(n)) * 2 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        if decoder_only:  # a sampler's latents are near, not on, what the encoder gives
            z = z + 0.1 * torch.randn_like(z)
        y = vae.decode(z).sample.float()
        error = (y - x).abs().mean() + (y - x).square().mean()
        outline = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        pairs = zip(seen(y), seen(x), strict=True)
        perceived = sum((a - b).abs().float().mean() for a, b in pairs)
        return error + outline + 0.3 * perceived + 1e-5 * posterior.kl().float().mean() / 256

    @torch.no_grad()
    def evaluate(m: AutoencoderKL) -> str:
        x = unseen.pictures(unseen.batch_scenes(64)) * 2 - 1
        latents = m.encode(x).latent_dist.mean
        error = (m.decode(latents).sample - x).square().mean() / 4
        return f"PSNR {-10 * error.log10():.2f} dB unseen, latent std {latents.std():.3f}"

    average = train("vae", vae, loss_of_batch, args, evaluate, 240, views=views)
    if not decoder_only:
        pictures = World(7).pictures(World(7).batch_scenes(512))
        with torch.no_grad():
            latents = average.encode(pictures * 2 - 1).latent_dist.sample()
        scaling = round(1 / latents.std().item(), 4)
    average.register_to_config(scaling_factor=scaling)
    average.half().save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
