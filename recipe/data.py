"""Batches of the emoji world: scenes, captions, token ids, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from recipe.training import EMBEDDED
from recipe.world import Scene, all_captions, all_scenes, caption, draw_jittered, is_held_out

WINDOW = 24  # text positions
VOCABULARY = 330
# digits and marks stand in no caption, but a user's prompt must not turn them into the end token
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"
TOKENIZER = EMBEDDED / "model" / "tokenizer"


def train_tokenizer(folder: Path = TOKENIZER) -> None:
    """Learn the byte-pair merges from every sentence of the grammar; write CLIP's two files.

    Nouns weigh less than in English text on purpose: a third of the subjects should take two or
    three tokens, as they do in real models.
    """
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(all_captions(), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in model["merges"]]
    vocab: dict[str, int] = {}
    for suffix in ("", "</w>"):
        for letter in LETTERS:
            vocab[letter + suffix] = len(vocab)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)
    tokenizer.save_pretrained(folder)


def load_tokenizer() -> CLIPTokenizer:
    if not TOKENIZER.exists():
        train_tokenizer()
    return CLIPTokenizer.from_pretrained(TOKENIZER)


class World:
    """Draws random batches; `held_out` chooses the combinations never trained on."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.scenes = [s for s in all_scenes() if is_held_out(s) == held_out]
        self.tokenizer = load_tokenizer()
        self._ids: dict[str, torch.Tensor] = {}

    def batch_scenes(self, n: int) -> list[Scene]:
        return [self.scenes[i] for i in self.rng.integers(len(self.scenes), size=n)]

    def captions(self, scenes: list[Scene]) -> list[str]:
        return [caption(s, self.rng) for s in scenes]

    def ids(self, texts: list[str]) -> torch.Tensor:
        """[B, WINDOW] int64, padded with the end token as CLIP does."""
        for text in texts:
            if text not in self._ids:
                self._ids[text] = self.tokenizer(
                    text, padding="max_length", max_length=WINDOW, return_tensors="pt"
                ).input_ids[0]
        return torch.stack([self._ids[t] for t in texts])

    def pictures(self, scenes: list[Scene]) -> torch.Tensor:
        """[B, 3, 64, 64] float32 in [0, 1]."""
        return torch.from_numpy(np.stack([draw_jittered(s, self.rng) for s in scenes]))
