"""Packed, prompt-sharing, chunked log-probabilities against the plainest way: one sequence at a time."""

import pytest
import torch
from conftest import ARCHITECTURES, PACKED, batch_of, random_pairs, tiny

import common
from common import enable_packing, plain_score, score

pytestmark = pytest.mark.usefixtures("exact")
SHAPES = {
    "mixed": random_pairs(0, 4),
    "one pair": random_pairs(1, 1),
    "one-token completions": [([5, 6, 7], [8], [9]), ([5], [6], [7])],
    "very different lengths": [([3] * 40, [4, 5] * 20, [6]), ([7], [8], [9, 10] * 25)],
}


def by_hand(model, pairs) -> torch.Tensor:
    """Log-probabilities of all completion tokens, from a forward pass of each prompt and completion alone."""
    logps = []
    for prompt, *completions in pairs:
        for completion in completions:
            logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
            places = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
            logps.append(logits.log_softmax(-1)[places, torch.tensor(completion)])
    return torch.cat(logps)


def gradient(model, logps: torch.Tensor) -> torch.Tensor:
    """The gradient of a sum that weights every token differently."""
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    grads = torch.autograd.grad((weights * logps).sum(), [*model.parameters()], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logps_and_gradients_equal_those_of_single_sequences(kind, shape):
    model, pairs = tiny(kind), SHAPES[shape]
    want = by_hand(model, pairs)
    want_gradient = gradient(model, want)
    enable_packing(model)
    assert model.packed == (kind in PACKED)
    got = score(model, batch_of(pairs)).token_logps
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient(model, got), want_gradient, rtol=0, atol=1e-9)
    got = plain_score(model, batch_of(pairs)).token_logps
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient(model, got), want_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["falcon", "gemma2", "cohere"])
def test_packing_would_be_wrong_where_it_is_refused(kind, capsys):
    model = tiny(
        kind, initializer_range=0.02
    )  # as random models usually are: the check must notice small differences
    enable_packing(model)
    assert not model.packed
    assert "padded" in capsys.readouterr().out
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_a_prompt_is_in_the_row_once_and_last_tokens_are_not():
    (prompt, chosen, rejected), *_ = pairs = random_pairs(3, 2)
    batch = batch_of(pairs)
    assert batch.input_ids[0].tolist()[: len(prompt) + len(chosen) - 1] == prompt + chosen[:-1]
    assert batch.input_ids.numel() == sum(len(p) + len(c) + len(r) - 2 for p, c, r in pairs)
    assert batch.labels.tolist() == [token for _, c, r in pairs for token in c + r]
    assert batch.lengths.tolist() == [[len(c), len(r)] for _, c, r in pairs]


def test_a_model_that_knows_no_logits_to_keep():
    model, pairs = tiny("llama"), [([5, 6, 7, 8], [9], [10, 11]), ([5, 6, 7], [8, 9], [10])]
    model.balancing_loss, forward = None, model.forward
    want = plain_score(model, batch_of(pairs)).token_logps
    torch.testing.assert_close(want, by_hand(model, pairs), rtol=0, atol=1e-10)
    model.forward = lambda logits_to_keep, **inputs: forward(**inputs)
    assert torch.equal(plain_score(model, batch_of(pairs)).token_logps, want)


@pytest.mark.parametrize("kind", PACKED)
def test_no_mask_over_the_whole_row_is_made(kind, monkeypatch):
    model, batch, masks = tiny(kind), batch_of(random_pairs(4, 3)), []

    def attention(module, query, key, value, mask, **options):
        masks.append(mask)
        return common.packed_attention(module, query, key, value, mask, **options)

    enable_packing(model)
    monkeypatch.setitem(common.AttentionInterface._global_mapping, "packed", attention)
    score(model, batch)
    assert len(masks) == 2 and all(mask is None or mask.numel() == 1 for mask in masks)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_in_bfloat16_generate_sees_the_model_that_score_sees(kind, checkpointing, tmp_path):
    """FSDP's hooks, which are out while generating, change no inputs: OLMo gives its layers float32 ones."""
    tiny(kind).float().save_pretrained(tmp_path)
    args = common.Arguments(str(tmp_path), bf16=True, gradient_checkpointing=checkpointing)
    model = common.load_model(str(tmp_path), args, torch.device("cpu"), trainable=True)
    assert model.packed
    batch = batch_of(random_pairs(4, 3))
    logps = model.score(batch).token_logps
    logps.sum().backward()  # recomputed with checkpointing: to the same dtypes, or it fails
    with torch.no_grad(), common.gathered(model, args):
        torch.testing.assert_close(score(model, batch).token_logps, logps, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_chunk_size_changes_nothing(size, monkeypatch):
    model, batch = tiny("llama"), batch_of(random_pairs(4, 3))
    enable_packing(model)
    want = score(model, batch).token_logps
    want_gradient = gradient(model, want)
    monkeypatch.setattr(common, "CHUNK_LOGITS", size * model.config.vocab_size)
    got = score(model, batch).token_logps
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(model, got), want_gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_gradient_checkpointing_changes_nothing(kind):
    model, batch = tiny(kind), batch_of(random_pairs(5, 3))
    enable_packing(model)
    want = gradient(model, score(model, batch).token_logps)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(model, score(model, batch).token_logps), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_collisions(kind):
    model, pairs = tiny(kind), random_pairs(6, 2)
    enable_packing(model)
    got = score(model, batch_of(pairs), collisions=True).log_collisions
    want = []
    for prompt, *completions in pairs:
        for y in completions:
            probs = model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            want.append((probs**2).sum(-1).log())
    torch.testing.assert_close(got, torch.cat(want).detach(), rtol=0, atol=1e-10)


def test_balancing_loss_counts_each_token_of_the_row_once():
    model, pairs = tiny("mixtral", output_router_logits=True), random_pairs(7, 3)
    enable_packing(model)
    got = score(model, batch_of(pairs)).aux_loss
    router = [[] for _ in range(2)]
    for prompt, chosen, rejected in pairs:  # a prompt's routing does not depend on what follows it
        for sequence, first in ((prompt + chosen[:-1], 0), (prompt + rejected[:-1], len(prompt))):
            for layer, logits in enumerate(
                model.model(torch.tensor([sequence]), output_router_logits=True).router_logits
            ):
                router[layer].append(logits[first:])
    want = model.balancing_loss(tuple(torch.cat(layer) for layer in router))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_sums_are_per_completion():
    pairs = random_pairs(8, 3)
    batch = batch_of(pairs)
    values = torch.arange(len(batch.labels), dtype=torch.float64)
    parts = values.split([len(y) for pair in pairs for y in pair[1:]])
    assert batch.sum(values).flatten().tolist() == [part.sum().item() for part in parts]


def test_a_batch_of_no_pairs_contributes_nothing():
    model = tiny("llama")
    enable_packing(model)
    batch = batch_of([])
    assert batch.sum(score(model, batch).token_logps).shape == (0, 2)
    assert batch.sum(plain_score(model, batch).token_logps).shape == (0, 2)
