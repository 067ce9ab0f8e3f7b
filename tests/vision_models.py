"""Tiny random vision–language models of three families with their processors, and pairs about images.

torchrun tests/vision_models.py FOLDER OUT writes metrics and gradients of one step, differently split.
"""

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

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

import common
import dpo

KINDS = ("idefics3", "llava", "qwen2_vl")
REFERENCE = [[-20.0 - i, -9.0 - 2 * i] for i in range(6)]  # log-probabilities, of some model
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else 'IMAGE' }}{% endfor %}"
    "{% if not (loop.last and message.role == 'assistant' and continue_final_message) %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<user>", "<assistant>", "<system>", "<image>", "<fake_token_around_image>", "<global-img>"]
SPECIAL += ["<end_of_utterance>"]
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, max_position_embeddings=256)
TEXT |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
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
        more = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = LlavaProcessor(CLIPImageProcessorPil(**sizes), tok, patch, **more, **template)
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
        text = text | {"model_type": "qwen2_vl_text", "rope_parameters": rope}
        patches = {"patch_size": patch, "temporal_patch_size": 1}
        vision = {"embed_dim": vision["hidden_size"], "hidden_size": text["hidden_size"], "depth": 2}
        vision |= {"num_heads": 2, "mlp_ratio": 2, "spatial_merge_size": 2}
        vision |= {"initializer_range": 0.2, **patches}
        # The processor of Qwen2-VL itself wants torchvision, for videos; this one does the same to images.
        sizes = {"shortest_edge": 4 * patch**2, "longest_edge": size**2}
        pixels = Qwen2VLImageProcessorPil(merge_size=2, size=sizes, **patches)
        processor = PaddleOCRVLProcessor(pixels, tok, **template)
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, **options)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64)
    return model, processor


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(i: int, *images, **more) -> dict:
    """A preference pair whose prompt shows the first image before a text, and the others after it."""
    content = [{"type": "text", "text": f"see {i}"}, *({"type": "image"} for _ in images[1:])]
    content = [{"type": "image"} for _ in images[:1]] + content
    pair = {"chosen": f"it is {i}", "rejected": ["no", "who knows?", "x"][i % 3]}
    answers = {name: [{"role": "assistant", "content": text}] for name, text in pair.items()}
    return {"images": [*images], "prompt": [{"role": "user", "content": content}], **answers, **more}


def save(kind: str, path: Path) -> None:
    model, processor = build(kind)
    model.save_pretrained(path)
    processor.save_pretrained(path)


def write_data(folder: Path, rows: list[dict], name: str = "train.jsonl") -> None:
    """Rows as jsonl, with PNG files in a folder beside it."""
    (folder / "files").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
        names = [f"files/{i}-{j}.png" for j in range(len(row["images"]))]
        for file, image in zip(names, row["images"], strict=True):
            image.save(folder / file)
        lines.append(json.dumps(row | {"images": names}))
    (folder / name).write_text("\n".join(lines))


def some_rows() -> list[dict]:
    """Six pairs: with one image, with two, of several sizes, and two pairs of text alone."""
    one, wide, other, small, high = (picture(*x) for x in ((0,), (1, 32), (2,), (3, 8, 8), (4, 16, 40)))
    images = [[one], [], [wide, other], [small], [], [high]]
    return [row(i, *found) for i, found in enumerate(images)]


def gradients(folder: Path, out: Path | None = None) -> dict:
    """{(kind, pairs per micro-batch): (metrics, gradient)} of one step in float64, also as a file."""
    rank, world, device = common.start(dpo.Arguments("none", output_dir=str(folder / "out")))
    results = {}
    for kind in KINDS:
        path, data = str(folder / kind), str(folder / "train.jsonl")
        options = {"dataset_name": data, "dtype": "float64", "eval_strategy": "no", "batch_size": 6}
        args = dpo.Arguments(path, **options)
        policy = common.load_model(path, args, device, trainable=True)
        train, _ = common.load_data(args, common.load_tokenizer(path, args))
        for size in (6 // world, 2, 1):
            log = SimpleNamespace(shares={}, signals=[])
            for batch in common.micro_batches(train, np.arange(6), size, device):
                reference = lambda batch: torch.tensor(REFERENCE, dtype=torch.float64)[batch.rows]  # noqa: E731
                loss, metrics = dpo.loss_and_metrics(policy, reference, batch, args, torch.zeros(2))
                (loss * world).backward()
                common.Log.add(log, metrics)
            parts = [p.grad.full_tensor().flatten() for p in policy.parameters() if p.grad is not None]
            results[kind, size] = common.Log.all_reduce(log)[0], torch.cat(parts).numpy()
            policy.zero_grad()
    if out and rank == 0:
        out.write_bytes(pickle.dumps(results))
    return results


if __name__ == "__main__":
    # Normalisation layers compute in float32, unless that is another name of float64.
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    gradients(Path(sys.argv[1]), Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
