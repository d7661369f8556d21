"""CLIP's own tokenizer, and a pipeline whose text encoder is as large as Stable Diffusion 1.x's."""

from __future__ import annotations

import gzip
from importlib import resources
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fasttrace.testing.tiny import tiny_pipeline

WINDOW = 77  # text length
WIDTH = 768


def clip_tokenizer() -> Any:
    """CLIP's byte-pair encoding: 49,408 tokens, 77 places.

    Numbered as OpenAI does: 256 bytes, the same at the end of a word, a token a merge (48,894),
    begin and end.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges()
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary += [left + right for left, right in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=WINDOW)


def clip_size_pipeline(layers: int = 12, seed: int = 0) -> Any:
    """A StableDiffusionPipeline with CLIP-L's tokenizer and text encoder, random weights.

    UNet and VAE are `tiny_pipeline`'s, but for the text width 768. layers: of the text encoder. The
    global random generator is left alone.
    """
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=WINDOW,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    small = tiny_pipeline(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModel(config)
        _spread(encoder)
        unet = UNet2DConditionModel.from_config(small.unet.config, cross_attention_dim=WIDTH)
    pipe = StableDiffusionPipeline(
        vae=small.vae,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _merges() -> list[tuple[str, str]]:
    """The pairs of pieces that become one, most frequent first."""
    file = resources.files("fasttrace.testing") / "clip_vocabulary.txt.gz"
    _version, *lines = gzip.decompress(file.read_bytes()).decode("utf-8").strip().split("\n")
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


def _spread(encoder: torch.nn.Module) -> None:
    """As trained encoders have it: norms that differ by channel, biases, attention that chooses."""
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.normal_(0, 0.5).exp_()
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
            elif "q_proj" in name or "k_proj" in name:
                weight.mul_(4)
