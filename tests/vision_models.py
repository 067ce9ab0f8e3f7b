"""Tiny random vision–language models of three families with their processors, and pairs about drawn images."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    Idefics3Processor,
    LlavaProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else 'IMAGE' }}{% endfor %}"
    "{% if not (loop.last and message.role == 'assistant' and continue_final_message) %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<user>", "<assistant>", "<system>", "<image>", "<fake_token_around_image>", "<global-img>"]
SPECIAL += ["<end_of_utterance>"]
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
# A checkpoint may have dropout, which training must switch off.
TEXT |= dict(initializer_range=0.2, attention_dropout=0.1)
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
VISION |= dict(image_size=16, patch_size=4, initializer_range=0.2, attention_dropout=0.1)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    characters = " abcdefghijklmnopqrstuvwxyz0123456789.,?"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *SPECIAL, *characters])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens(SPECIAL)
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left"}
    options |= {"extra_special_tokens": {"image_token": "<image>"}}
    return PreTrainedTokenizerFast(tokenizer_object=characters, **options)


def build(kind: str, seed: int = 0, text: dict | None = None, vision: dict | None = None):
    """(model in float64, processor)."""
    tok, text, vision = tokenizer(), TEXT | (text or {}), VISION | (vision or {})
    template = {"chat_template": TEMPLATE.replace("IMAGE", "<image>")}
    text["vocab_size"], image = len(tok), tok.convert_tokens_to_ids("<image>")
    size, patch = vision["image_size"], vision["patch_size"]
    options = {"image_token_id": image, "pad_token_id": 0}
    if kind == "idefics3":
        text, vision = text | {"model_type": "llama"}, vision | {"model_type": "idefics3_vision"}
        options |= {"scale_factor": 2}
        sizes = {"size": {"longest_edge": size}, "max_image_size": {"longest_edge": size}}
        pixels = Idefics3ImageProcessorPil(**sizes, do_image_splitting=False)
        processor = Idefics3Processor(pixels, tok, image_seq_len=(size // patch // 2) ** 2, **template)
    elif kind == "llava":
        text = text | {"model_type": "llama"}
        vision = vision | {"model_type": "clip_vision_model", "projection_dim": 16, "num_hidden_layers": 3}
        options |= {"image_token_index": image, "vision_feature_layer": -2}
        sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        more = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = LlavaProcessor(CLIPImageProcessorPil(**sizes), tok, **more, **template)
    else:
        text = text | {"model_type": "qwen2_vl_text", "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
        vision = {"embed_dim": 16, "hidden_size": text["hidden_size"], "depth": 2, "num_heads": 2, "mlp_ratio": 2}
        vision |= {"patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 1, "initializer_range": 0.2}
        # The processor of Qwen2-VL itself wants torchvision, for videos; this one does the same to images.
        pixels = Qwen2VLImageProcessorPil(
            patch_size=patch, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 4 * patch**2, "longest_edge": size**2}
        )
        processor = PaddleOCRVLProcessor(pixels, tok, **template)
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, **options)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64)
    return model, processor


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
