"""The parts of a tiny Kandinsky: a prior that runs in milliseconds, a decoder of two levels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    KandinskyCombinedPipeline,
    KandinskyV22CombinedPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizer,
)

from fasttrace.testing.tiny import (
    _WIDTH,
    _WORDS,
    PICTURE,
    WINDOW,
    _text_encoder,
    tiny_tokenizer,
)

LONG = 77  # tokens that the pipeline gives the multilingual encoder, whatever its tokenizer says


def kandinsky_parts(multilingual: bool) -> tuple[Any, dict[str, Any]]:
    """The combined pipeline's class and its parts, without the decoder's scheduler."""
    parts: dict[str, Any] = {
        "unet": _unet(multilingual),
        "movq": _movq(),
        "prior_prior": _prior(),
        "prior_image_encoder": _image_encoder(),
        "prior_text_encoder": _text_encoder(CLIPTextModelWithProjection),
        "prior_tokenizer": tiny_tokenizer(),
        "prior_scheduler": UnCLIPScheduler(
            prediction_type="sample", clip_sample_range=5.0, variance_type="fixed_small_log"
        ),
        "prior_image_processor": CLIPImageProcessor(size=PICTURE, crop_size=PICTURE),
    }
    if not multilingual:
        return KandinskyV22CombinedPipeline, parts
    tokenizer = tiny_multilingual_tokenizer()
    parts |= {"tokenizer": tokenizer, "text_encoder": _multilingual_encoder(tokenizer)}
    return KandinskyCombinedPipeline, parts


def tiny_multilingual_tokenizer() -> Any:
    """An XLM-Roberta tokenizer that knows a few words whole and spells the others out."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [(mark, 0.0) for mark in marks]
    vocabulary += [("▁" + word, -2.0) for word in _WORDS if word != "a"]
    vocabulary += [("▁a", -2.0), ("▁", -8.0), *((letter, -6.0) for letter in letters)]
    return XLMRobertaTokenizer(vocab=[*vocabulary, ("<mask>", 0.0)], model_max_length=512)


def _multilingual_encoder(tokenizer: Any) -> Any:
    config = MCLIPConfig(
        transformerDimSize=_WIDTH,
        imageDimSize=_WIDTH,
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LONG + 2,  # the first two are for padding
        pad_token_id=tokenizer.pad_token_id,
    )
    return MultilingualCLIP(config)


def _prior() -> Any:
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=_WIDTH,
        num_embeddings=WINDOW,
    )
    with torch.no_grad():  # zero as they are made, so that no text would reach the decoder
        prior.clip_std.fill_(1.0)
        prior.clip_mean.normal_(0, 0.1)
        for name, weight in prior.named_parameters():
            if name.endswith("weight") and "norm" not in name:
                weight.mul_(2.0)
    return prior


def _image_encoder() -> Any:
    config = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=PICTURE,
        patch_size=4,
        projection_dim=_WIDTH,
    )
    return CLIPVisionModelWithProjection(config)


def _movq() -> Any:
    return VQModel(
        block_out_channels=(32, 32),  # its spatial norm has 32 groups
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        vq_embed_dim=4,
        norm_type="spatial",
    )


def _unet(multilingual: bool) -> Any:
    kind = "text_image" if multilingual else "image"
    return UNet2DConditionModel(
        sample_size=PICTURE // 2,
        in_channels=4,
        out_channels=8,  # the noise and its variance
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=_WIDTH,
        encoder_hid_dim=_WIDTH,
        encoder_hid_dim_type=f"{kind}_proj",
        addition_embed_type=kind,
        resnet_time_scale_shift="scale_shift",
    )
