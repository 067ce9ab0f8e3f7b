"""Vision–language models in dpo.py, on tiny random models of three families."""

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, parse, run_script, tiny
from safetensors.torch import load_file
from test_runs import assert_same_run, environment, metrics_of
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from vision_models import KINDS, build, gradients, picture, row, save, some_rows, write_data

import common
import dpo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Directories idefics3, llava and qwen2_vl with models, and train.jsonl with six pairs."""
    folder = tmp_path_factory.mktemp("vision")
    for kind in KINDS:
        save(kind, folder / kind)
    write_data(folder, some_rows())
    return folder


def load(folder: Path, kind: str, data: str = "train.jsonl", **options):
    """(tokenizer, data) as dpo.py loads them."""
    options = {"dataset_name": str(folder / data), "eval_strategy": "no"} | options
    args = dpo.Arguments(str(folder / kind), **options)
    tokenizer = common.load_tokenizer(str(folder / kind), args)
    return tokenizer, common.load_data(args, tokenizer)[0]


def batches(data: common.Data, size: int, rows=None) -> list[common.Batch]:
    return [*common.micro_batches(data, np.arange(len(data.lengths)) if rows is None else rows, size, CPU)]


# ---------------------------------------------------------------------------------------- log-probabilities


def by_hand(model, processor, row: dict) -> list[torch.Tensor]:
    """Log-probabilities of the tokens of both completions, each with its prompt and images alone."""
    logps = []
    for name in ("chosen", "rejected"):
        parts = [{"role": "assistant", "content": [{"type": "text", "text": row[name][0]["content"]}]}]
        prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        whole = processor.apply_chat_template(row["prompt"] + parts)
        images = {"images": row["images"]} if row["images"] else {}
        n = len(processor(text=[prompt], **images)["input_ids"][0])
        inputs = processor(text=[whole], return_tensors="pt", **images)
        labels = inputs["input_ids"][0, n:]
        logits = model(**inputs, use_cache=False).logits[0, n - 1 : -1]
        logps.append(logits.log_softmax(-1)[torch.arange(len(labels)), labels])
    return logps


def gradient(model, logps: torch.Tensor) -> torch.Tensor:
    """The gradient of a sum that weights every token differently."""
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    parameters = [*model.parameters()]
    grads = torch.autograd.grad(
        (weights * logps).sum(), parameters, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("rows", [range(6), [1, 4]])  # the latter have no images: a blank one is added
@pytest.mark.parametrize("kind", KINDS)
def test_logps_and_gradients_equal_a_forward_pass_by_hand(folder, kind, rows):
    (model, processor), (_, data) = build(kind), load(folder, kind)
    want = torch.cat([logps for i in rows for logps in by_hand(model.eval(), processor, some_rows()[i])])
    want_gradient = gradient(model, want)
    common.choose_forward_pass(model)
    assert model.forward_pass == "padded"
    (batch,) = batches(data, 6, np.array(rows))
    assert len(batch.labels) == 2 * len(rows)
    assert len(batch.inputs["input_ids"]) == 2 * len(rows) + (len(rows) == 2)
    for function in (common.token_logps, common.plain_token_logps)[: 1 + (len(rows) == 6)]:
        got = function(model, batch)
        assert (got[~batch.completions] == 0).all()
        got = got[batch.completions]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient(model, got), want_gradient, rtol=0, atol=1e-9)
    tower = torch.cat([p.flatten() for p in model.get_encoder(modality="image").parameters()])
    assert (want_gradient.count_nonzero() > len(tower)) and len(rows) in (2, 6)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_image_may_be_longer_than_the_texts_beside_it(folder, kind):
    model, (tokenizer, data) = build(kind)[0].eval(), load(folder, kind)
    common.choose_forward_pass(model)
    p, c, d, r = tokenizer("one,", add_special_tokens=False)["input_ids"][:4]
    for examples in ([], [([p], [c, d], [r])]):
        batch = common.collate(examples, CPU, vision=data.vision, global_pairs=1)
        assert batch.inputs["input_ids"].shape[1] == len(data.vision.blank_prompt) > 3
        logps = common.token_logps(model, batch)
        assert logps.shape[0] == 2 * len(examples)
        for found, y in zip(logps, [y for _, *answers in examples for y in answers], strict=True):
            want = model(torch.tensor([[p, *y]])).logits[0, :-1].log_softmax(-1)[range(len(y)), y]
            torch.testing.assert_close(found[: len(y)], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_its_own_images_in_their_order(folder, kind, tmp_path):
    model = build(kind)[0].eval()
    rows = some_rows()
    rows[2]["images"].reverse()  # two images of one row
    rows[0]["images"], rows[5]["images"] = rows[5]["images"], rows[0]["images"]
    write_data(tmp_path, rows)
    common.choose_forward_pass(model)
    found = []
    for data in (folder / "train.jsonl", tmp_path / "train.jsonl"):
        (batch,) = batches(load(folder, kind, data)[1], 6)
        found.append(common.token_logps(model, batch).sum(1).view(-1, 2))
    changed = ((found[0] - found[1]).abs() > 1e-4).all(1).tolist()
    assert changed == [True, False, True, False, False, True]


@pytest.mark.usefixtures("exact")
def test_a_split_batch_has_the_same_gradient(folder, tmp_path, monkeypatch):
    """Also where a micro-batch, of one process or of both, has no image."""
    out = tmp_path / "2"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, str(ROOT / "tests" / "vision_models.py"), str(folder), str(out)]
    path = {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment() | path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    found = {1: gradients(folder), 2: pickle.loads(out.read_bytes())}
    for kind in KINDS:
        want_metrics, want = found[1][kind, 6]
        assert abs(want).max() > 0.01
        for (other, _), (metrics, got) in [item for world in (1, 2) for item in found[world].items()]:
            if other == kind:
                assert metrics == pytest.approx(want_metrics, rel=1e-12, abs=1e-12)
                assert abs(got - want).max() < 1e-12 * abs(want).max()


def test_pixels_are_made_while_the_batch_before_is_used(folder, monkeypatch):
    _, data = load(folder, "llava")
    made, second = [], threading.Event()
    inputs = common.Vision.inputs

    def record(vision, *args):
        made.append(threading.current_thread())
        if len(made) == 2:
            second.set()
        return inputs(vision, *args)

    monkeypatch.setattr(common.Vision, "inputs", record)
    batches = common.micro_batches(data, np.arange(6), 2, CPU)
    assert next(batches).rows.tolist() == [0, 1]
    assert second.wait(timeout=60)  # although nothing has asked for it
    assert [batch.rows.tolist() for batch in batches] == [[2, 3], [4, 5]] and len(made) == 3
    assert threading.main_thread() not in made


def test_an_image_that_cannot_be_read_any_more_ends_the_training(folder, monkeypatch):
    _, data = load(folder, "llava")
    monkeypatch.setattr(common.Vision, "read", lambda vision, row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batches(data, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_images_in_a_batch_is_generate_alone(folder, kind):
    model, processor = build(kind)
    tokenizer, data = load(folder, kind)
    args = dpo.Arguments("none", max_new_tokens=4, per_device_eval_batch_size=2)
    order = [0, 2, 1, 4, 5]  # two with images, two without any, and one
    images = [data.vision.read(data.raw[i]) for i in order]
    prompts = data.tokens[order]["prompt"]
    got = common.generate(model, tokenizer, prompts, args, images, do_sample=False)
    for i, completion in zip(order, got, strict=True):
        pair = some_rows()[i]
        text = processor.apply_chat_template(pair["prompt"], add_generation_prompt=True)
        inputs = processor(text=[text], images=pair["images"] or None, return_tensors="pt")
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        want = model.eval().generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert completion == want[: len(completion)].tolist()


# ----------------------------------------------------------------------------------------------------- runs

SHORT = (
    "--max_steps 4 --batch_size 4 --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --seed 3 "
)
SHORT += "--learning_rate 1e-2 --save_steps 2 --max_new_tokens 4 --eval_prompts 6 --report_to none "


def run(monkeypatch, folder: Path, kind: str, out: Path, flags: str = "") -> None:
    """Run dpo.py in this process; the training data are the test data as well."""
    data = folder / "both"
    if not data.exists():
        data.mkdir()
        for name in ("train", "test"):
            write_data(data, some_rows(), f"{name}.jsonl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    flags = f"{SHORT} --output_dir {out} {flags}"
    run_script(monkeypatch, "dpo", f"--model_name_or_path {folder / kind} --dataset_name {data} {flags}")


RUNS = {
    "idefics3": "--freeze_vision_tower --precompute_ref_log_probs",
    "llava": "--gradient_checkpointing --ref_model_name_or_path {same}",
    "qwen2_vl": "--use_peft --bf16 true",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_at_zero_and_what_it_saves_loads(monkeypatch, folder, tmp_path, kind):
    out = tmp_path / "out"
    run(monkeypatch, folder, kind, out, RUNS[kind].replace("{same}", str(folder / kind)))
    before, first, *_, last = metrics_of(out)
    for metrics, prefix in ((before, "eval_"), (first, "")):
        assert metrics[f"{prefix}rewards/chosen"] == metrics[f"{prefix}rewards/rejected"] == 0
        assert metrics[f"{prefix}loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert last["eval_loss"] < 0.6
    samples = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and {sample["prompt"] for sample in samples} >= {"see 0", "see 2"}

    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    processor = AutoProcessor.from_pretrained(out)
    assert type(processor) is type(build(kind)[1]) and processor.chat_template
    with torch.no_grad():
        logps = [[y.sum() for y in by_hand(model, processor, pair)] for pair in some_rows()]
    exactness = {"rel": 1e-2} if kind == "qwen2_vl" else {"rel": 1e-5}  # one computed in bfloat16
    for i, name in enumerate(("chosen", "rejected")):
        assert torch.tensor(logps)[:, i].mean() == pytest.approx(last[f"eval_logps/{name}"], **exactness)
    if kind == "llava":
        assert (
            model.config.text_config.attention_dropout == model.config.vision_config.attention_dropout == 0.1
        )


def test_a_frozen_vision_tower_stays_and_the_rest_is_trained(monkeypatch, folder, tmp_path):
    run(monkeypatch, folder, "idefics3", tmp_path / "out", "--freeze_vision_tower --bf16 true --max_steps 1")
    old, new = (load_file(path / "model.safetensors") for path in (folder / "idefics3", tmp_path / "out"))
    assert old.keys() == new.keys()
    same = {name for name in old if torch.equal(old[name].float(), new[name])}
    tower = {name for name in old if name.startswith("model.vision_model.")}
    assert tower and tower <= same and len(same - tower) < 3


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_for_the_linear_layers_of_the_language_model(folder, kind):
    args = dpo.Arguments(str(folder / kind), dataset_name="none", use_peft=True)
    policy = common.load_model(str(folder / kind), args, CPU, trainable=True)
    adapted = {name.split(".lora_")[0] for name, _ in policy.named_parameters() if "lora_" in name}
    decoder = policy.get_decoder()
    prefix = next(name for name, module in policy.named_modules() if module is decoder)
    assert all(name.startswith(f"{prefix}.layers.") for name in adapted) and len(adapted) == 2 * 7


@pytest.mark.parametrize("kind", ["llava"])  # of whose vision tower the last layer is not used
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(monkeypatch, folder, tmp_path, kind):
    run(monkeypatch, folder, kind, tmp_path / "a")
    all_reduce = common.Log.all_reduce

    def interrupted(log):
        metrics, _ = all_reduce(log)
        return metrics, log.bar.n == 1  # evaluations do not read this

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(common.Log, "all_reduce", interrupted)
        run(monkeypatch, folder, kind, tmp_path / "b")
    assert [line["step"] for line in metrics_of(tmp_path / "b")] == [0, 1, 2]
    run(monkeypatch, folder, kind, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ----------------------------------------------------------------------------------------------------- data


def test_trls_documented_command_is_accepted_as_it_is(monkeypatch):
    command = (
        "--dataset_name HuggingFaceH4/rlaif-v_formatted --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 32 --dataset_num_proc 32 "
        "--output_dir dpo_qwen_2_5_rlaif-v --dtype bfloat16 --use_peft --lora_target_modules all-linear"
    )
    args = parse(monkeypatch, "dpo", command)
    assert (args.batch_size, args.dtype, args.use_peft) == (64, "bfloat16", True)
    assert parse(monkeypatch, "dpo", f"{command} --gradient_checkpointing").gradient_checkpointing


def test_images_may_be_files_bytes_or_pictures_in_a_column_of_one_or_several(folder, tmp_path):
    pairs = [row(0, picture(0)), row(1), row(2, picture(1, 16, 32))]
    write_data(tmp_path, pairs)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for line in lines:
        line["image"] = next(iter(line.pop("images")), None)
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for line in lines:
        line["image"] = line["image"] and {"bytes": (tmp_path / line["image"]).read_bytes(), "path": None}
    datasets.Dataset.from_list(lines).to_parquet(tmp_path / "bytes.parquet")
    kind = datasets.List(datasets.Image())
    pictures = datasets.Dataset.from_list(pairs).cast_column("images", kind)
    pictures.to_parquet(tmp_path / "pictures.parquet")
    pictures.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    os.rename(tmp_path / "files", tmp_path / "folder" / "files")
    os.symlink(tmp_path / "folder" / "files", tmp_path / "files")
    os.rename(tmp_path / "one.jsonl", tmp_path / "folder" / "train.jsonl")
    names = ["train.jsonl", "folder", "folder/train.jsonl", "bytes.parquet", "pictures.parquet", "saved"]
    found = [load(folder, "qwen2_vl", tmp_path / name)[1] for name in names]
    (want,) = batches(found[0], 3)
    assert want.inputs["image_grid_thw"].shape == (4, 3)
    for data in found[1:]:
        (batch,) = batches(data, 3)
        assert batch.inputs.keys() == want.inputs.keys()
        assert all(torch.equal(batch.inputs[name], want.inputs[name]) for name in want.inputs)


def test_image_tokens_are_prompt_and_too_many_of_them_drop_the_row(folder, tmp_path, capsys):
    chat = row(3, picture(3))  # without its first turn, and so without the image, it would have room
    for role, text in (("assistant", 60 * "x"), ("user", "go on")):
        chat["prompt"].append({"role": role, "content": [{"type": "text", "text": text}]})
    write_data(tmp_path, [row(0, picture(0)), row(1, *map(picture, range(3))), row(2), chat])
    for flags in ({}, {"truncate_prompt": True}):
        tokenizer, data = load(folder, "llava", tmp_path / "train.jsonl", max_length=50, **flags)
        said = capsys.readouterr().out
        line = "2 of 4 rows (50.0%) of the train split are dropped: the prompt leaves too little room in"
        assert f"{line} max_length 50\n" in said  # images are never cut
        image = data.vision.processor.image_token_id
        assert [ids.count(image) for ids in data.tokens["prompt"]] == [16, 0]
        assert data.raw["images"][1] == []
        (batch,) = batches(data, 2)
        assert not (batch.scored & (batch.labels == image)).any() and (batch.labels == image).sum() == 32
    tokenizer, data = load(folder, "llava", tmp_path / "train.jsonl", max_length=27)  # three places are left
    assert data.tokens["prompt"][0].count(image) == 16 and len(data.tokens["chosen"][0]) == 3


def test_the_cache_of_tokens_is_found_again(folder, monkeypatch):
    load(folder, "idefics3")
    monkeypatch.setattr(common.Vision, "insert", None)
    load(folder, "idefics3")


IMAGE = {"type": "image"}
ANSWER = [{"role": "assistant", "content": [IMAGE, {"type": "text", "text": "so"}]}]
WRONG = {
    "missing": ({"images": ["nowhere.png"]}, "No such file or directory: '{data}/nowhere.png'"),
    "broken": ({"images": ["broken.png"]}, "cannot identify image file '{data}/broken.png'"),
    "too few": ({"images": []}, "the number of images is 0, and the prompt has places for 1"),
    "too many": (
        {"images": ["a.png", "a.png"]},
        "the number of images is 2, and the prompt has places for 1",
    ),
    "answer": ({"chosen": ANSWER}, "a completion has an image"),
    "video": ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of type video, which"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_is_wrong_with_data(monkeypatch, folder, tmp_path, name):
    change, message = WRONG[name]
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    line = row(0, "a.png") | change
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    flags = (
        f"--model_name_or_path {folder}/llava --dataset_name {tmp_path}/rows.jsonl --output_dir {tmp_path}/o"
    )
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, "dpo", flags)
    said = str(stop.value)
    assert (
        said.startswith("error: ") and message.replace("{data}", str(tmp_path)) in said and "\n" not in said
    )
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def wrong(folder):
    """Beside the models: a text model with such a tokenizer, and a vision–language one without processor."""
    tokenizer = AutoProcessor.from_pretrained(folder / "llava").tokenizer
    for name, model in (("text", tiny("llama").float()), ("half", build("llava")[0].float())):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("cpo", "--model_name_or_path {dir}/llava", "is of type llava, which this script"),
        ("orpo", "--model_name_or_path {dir}/qwen2_vl", "is of type qwen2_vl, which this script"),
        ("dpo", "--model_name_or_path {dir}/half", "cannot load {dir}/half: Can't load image processor for"),
        ("dpo", "--model_name_or_path {dir}/text", "a part of type image, which this model does not"),
        ("dpo", "--model_name_or_path {toy} --freeze_vision_tower", "{toy} has no vision tower"),
        (
            "dpo",
            "--model_name_or_path {dir}/llava --ref_model_name_or_path {dir}/text",
            "the reference {dir}/text and {dir}/llava differ in images or an encoder",
        ),
    ],
)
def test_one_line_says_what_is_wrong_with_a_model(monkeypatch, wrong, tmp_path, method, flags, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row(0, str(wrong / "files" / "0-0.png"))))
    flags += f" --dataset_name {data} --output_dir {tmp_path}/o"
    for name, path in {"{dir}": str(wrong), "{toy}": common.TOY_MODEL}.items():
        flags, message = flags.replace(name, path), message.replace(name, path)
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, method, flags)
    assert str(stop.value).startswith("error: ") and message in str(stop.value)
    assert not (tmp_path / "o").exists()


def test_a_text_model_says_that_it_does_not_use_images(wrong, capsys):
    args = dpo.Arguments(str(wrong / "text"), dataset_name=str(wrong / "train.jsonl"), eval_strategy="no")
    common.load_data(args, AutoTokenizer.from_pretrained(wrong / "text"))
    said = capsys.readouterr().out
    assert "columns that are not used: images" in said and "4 of 6 rows (66.7%)" in said
