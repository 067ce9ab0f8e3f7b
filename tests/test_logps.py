"""Packed, prompt-sharing, chunked log-probabilities against the plainest way: one sequence at a time."""

from functools import partial
from types import MethodType, SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, PACKED, SMALL, batch_of, random_pairs, tiny
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import common
import dpo
from common import choose_forward_pass, collate, plain_token_logps, token_logps

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


def of_completions(logps: torch.Tensor, batch) -> torch.Tensor:
    """The entries of (2B, L) for completion tokens; all others have to be 0."""
    assert (logps[~batch.completions] == 0).all()
    return logps[batch.completions]


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
    choose_forward_pass(model)
    assert model.forward_pass == ("packed" if kind in PACKED else "padded")
    chosen, batch = model.forward_pass, batch_of(pairs)
    for forward_pass in (chosen, "padded", "the definition"):
        model.forward_pass = forward_pass
        got = (plain_token_logps if forward_pass == "the definition" else token_logps)(model, batch)
        got = of_completions(got, batch)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient(model, got), want_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["falcon", "gemma2"])
def test_packing_would_be_wrong_where_it_is_refused(kind, capsys):
    # Random models usually have such small weights: the check must notice small differences.
    model = tiny(kind, initializer_range=0.02)
    choose_forward_pass(model)
    assert model.forward_pass == "padded"
    assert "runs with padding" in capsys.readouterr().out
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_a_model_that_does_more_to_its_hidden_states_returns_its_own_logits():
    model, pairs = tiny("llama"), random_pairs(2, 3)
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden) * (2 if hidden.dim() == 3 else 1)
    choose_forward_pass(model)
    assert model.forward_pass == "padded"
    batch = batch_of(pairs)
    got = of_completions(token_logps(model, batch), batch)
    torch.testing.assert_close(got, by_hand(model, pairs), rtol=0, atol=1e-10)


def test_a_model_that_cannot_run_the_check_is_padded(monkeypatch, capsys):
    """As one that wants more inputs while it is trained."""

    def fails(model, batch):
        raise ValueError("token_type_ids are required")

    monkeypatch.setattr(common, "plain_token_logps", fails)
    model = tiny("llama")
    choose_forward_pass(model)
    assert model.forward_pass == "padded" and model.config._attn_implementation == "sdpa"
    assert "because ValueError: token_type_ids are required" in capsys.readouterr().out


def test_the_batch_is_the_picture_of_its_docstring():
    p1, p2, c1, c2, c3, r1, r2, q1 = range(10, 18)
    batch = batch_of([([p1, p2], [c1, c2, c3], [r1, r2]), ([q1], [c1, c2], [r1, r2, c3])])
    inputs = [[p1, p2, c1, c2], [p1, p2, r1, 0], [q1, c1, 0, 0], [q1, r1, r2, 0]]
    assert (batch.inputs["input_ids"] * batch.inputs["attention_mask"]).tolist() == inputs
    labels = [[p2, c1, c2, c3], [p2, r1, r2, 0], [c1, c2, 0, 0], [r1, r2, c3, 0]]
    assert (batch.labels * batch.inputs["attention_mask"]).tolist() == labels
    assert batch.completions.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.packed_inputs["input_ids"].tolist() == [[p1, p2, c1, c2, r1, q1, c1, r1, r2]]
    assert batch.packed_inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert batch.packed_lengths == [[4, 1, 2, 2], [4, 3, 2, 3]]  # tokens of each row in the row, and before
    assert batch.packed_inputs["keys"].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8]
    assert batch.packed_inputs["ends"].tolist() == [[0, 4, 5, 7, 9], [0, 4, 7, 9, 12]]


@pytest.mark.parametrize("forward_pass", ["packed", "padded"])
def test_prompts_are_scored_once_if_at_all(forward_pass):
    """For ORPO's term: the rows of chosen answers have log-probabilities of prompts, too."""
    model, pairs = tiny("llama"), random_pairs(9, 3)
    choose_forward_pass(model)
    model.forward_pass = forward_pass
    batch = batch_of(pairs, score_prompts=True)
    got = token_logps(model, batch)
    for i, (prompt, chosen, _) in enumerate(pairs):
        tokens = prompt + chosen
        logps = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        want = logps[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
        torch.testing.assert_close(got[2 * i, : len(want)], want, rtol=0, atol=1e-10)
        assert (got[2 * i, len(want) :] == 0).all()
    assert torch.equal(got[1::2] != 0, batch.completions[1::2])


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_another_number_of_completions_for_each_prompt(per_prompt):
    """As methods on unpaired data, or on several samples, have."""
    model = tiny("mistral")
    examples = [(p, *(c + [7] * i for i in range(per_prompt))) for p, c, _ in random_pairs(10, 4)]
    choose_forward_pass(model)
    assert model.forward_pass == "packed"
    batch = batch_of(examples) if per_prompt == 2 else collate(examples, torch.device("cpu"), global_pairs=4)
    assert len(batch.labels) == 4 * per_prompt
    got = of_completions(token_logps(model, batch), batch)
    torch.testing.assert_close(got, by_hand(model, examples), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", PACKED)
def test_no_mask_over_the_whole_row_is_made(kind, monkeypatch):
    model, batch, masks = tiny(kind), batch_of(random_pairs(4, 3)), []

    def attention(module, query, key, value, mask, **options):
        masks.append(mask)
        return common.packed_attention(module, query, key, value, mask, **options)

    choose_forward_pass(model)
    monkeypatch.setitem(common.AttentionInterface._global_mapping, "packed", attention)
    token_logps(model, batch)
    assert len(masks) == 2 and all(mask is None or mask.numel() == 1 for mask in masks)


def flash_attention(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size):
    """What varlen_attn computes on a GPU: queries (T, heads, size) are the last positions of their keys."""
    results, (before, after) = [], window_size
    assert ends_q.dtype == ends_k.dtype == torch.int32 and (ends_q[-1], ends_k[-1]) == (len(q), len(k))
    assert (max_q, max_k) == (ends_q.diff().max(), ends_k.diff().max()) and after == 0
    assert (ends_q.diff() > 0).all() and k.shape == v.shape and k.shape[1:] == q.shape[1:]
    for i in range(len(ends_q) - 1):
        x, y, z = (a[ends[i] : ends[i + 1]] for a, ends in ((q, ends_q), (k, ends_k), (v, ends_k)))
        at, of = torch.arange(len(x))[:, None] + len(y) - len(x), torch.arange(len(y))
        seen = (of <= at) & ((of >= at - before) | (before < 0))
        scores = torch.einsum("qhd,khd->hqk", x, y) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        results.append(torch.einsum("hqk,khd->qhd", weights, z))
    return torch.cat(results)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_attention_in_one_call_is_that_in_a_call_for_each_row(kind, monkeypatch):
    """With shared prompts, windows, and fewer heads of keys; a completion of one token has no queries."""
    calls, of_torch = [], common.varlen_attn

    def attention(q, k, v, *rest, **options):
        calls.append(rest)
        shapes = (x.to("meta", torch.bfloat16) for x in (q, k, v))  # torch's own takes these arguments
        ends = (x.to("meta") for x in rest[:2])
        assert of_torch(*shapes, *ends, *rest[2:], **options).shape == q.shape
        return flash_attention(q, k, v, *rest, **options)

    monkeypatch.setattr(common, "varlen_attn", attention)
    model, pairs = (
        tiny(kind),
        [*random_pairs(4, 3), ([3, 4], [5], [6, 7]), ([3, 4], [5, 6], [7]), ([3], [5], [6])],
    )
    choose_forward_pass(model)
    assert model.forward_pass == "packed" and not calls
    batch = batch_of(pairs, score_prompts=True)
    want = token_logps(model, batch)
    want_gradient = gradient(model, want.flatten())
    model.set_attn_implementation("varlen")
    got = token_logps(model, batch)
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(model, got.flatten()), want_gradient, rtol=0, atol=1e-11)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert len(calls) == model.config.num_hidden_layers  # generation does without
    assert token_logps(model, batch_of([])).shape[0] == 0


def test_attention_in_one_call_is_refused_where_nothing_is_packed(tmp_path, capsys):
    tiny("gemma2").save_pretrained(tmp_path)
    args = common.Arguments(str(tmp_path), varlen_attention=True)
    with pytest.raises(SystemExit, match="--varlen_attention is for models that can be packed"):
        common.load_model(str(tmp_path), args, torch.device("cpu"), trainable=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_in_bfloat16_generate_sees_the_model_that_is_trained(kind, checkpointing, tmp_path):
    """FSDP's hooks, which are out while generating, change no inputs: OLMo gives its layers float32 ones."""
    tiny(kind).float().save_pretrained(tmp_path)
    args = common.Arguments(str(tmp_path), bf16=True, gradient_checkpointing=checkpointing)
    model = common.load_model(str(tmp_path), args, torch.device("cpu"), trainable=True)
    assert model.forward_pass == "packed"
    batch = batch_of(random_pairs(4, 3))
    logps = model.token_logps(batch)
    logps.sum().backward()  # recomputed with checkpointing: to the same dtypes, or it fails
    with torch.no_grad(), common.gathered(model, args):
        torch.testing.assert_close(token_logps(model, batch), logps, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_chunk_size_changes_nothing(size, monkeypatch):
    model, batch = tiny("llama"), batch_of(random_pairs(4, 3))
    choose_forward_pass(model)
    want = of_completions(token_logps(model, batch), batch)
    want_gradient = gradient(model, want)
    monkeypatch.setattr(common, "CHUNK_LOGITS", size * model.config.vocab_size)
    got = of_completions(token_logps(model, batch), batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(model, got), want_gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("few", [True, False])
def test_few_logits_are_kept_and_others_made_again(few, monkeypatch):
    """The head's product: 100 tokens in chunks of ten. A second backward pass makes the logits again."""
    hidden, weight = torch.randn(100, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels, products = torch.randint(50, (100,)), []
    monkeypatch.setattr(common, "CHUNK_LOGITS", 100 * 50 if few else 100 * 50 - 1)
    monkeypatch.setattr(common, "CHUNK_TOKENS", 10)
    product = common.wide_product
    monkeypatch.setattr(common, "wide_product", lambda a, b: products.append(b.shape) or product(a, b))
    want = torch.autograd.grad((hidden @ weight.T).log_softmax(1)[torch.arange(100), labels].sum(), weight)
    logps = common.ChunkedHead.apply(hidden, weight, labels, common.label_logps)
    for times in (1 if few else 2, 2 if few else 3):
        torch.testing.assert_close(torch.autograd.grad(logps.sum(), weight, retain_graph=True), want)
        assert products.count((8, 50)) == 10 * times
    products.clear()
    with torch.no_grad():
        assert not common.ChunkedHead.apply(hidden, weight, labels, common.label_logps).requires_grad
    assert products == 10 * [(8, 50)]


def test_logits_and_the_heads_gradient_are_not_rounded_to_bfloat16(monkeypatch):
    """A thousand tokens in chunks of ten: rounding would be seen in the fourth digit, and in the sum."""
    monkeypatch.undo()  # this test is of float32
    torch.manual_seed(0)
    hidden, weight = torch.randn(1000, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    labels = torch.randint(50, (1000,))
    monkeypatch.setattr(common, "CHUNK_LOGITS", 10 * 50)
    inputs, exact_inputs = (
        [x.to(d, copy=True).requires_grad_() for x in (hidden, weight)]
        for d in (torch.bfloat16, torch.float64)
    )
    logps = common.ChunkedHead.apply(*inputs, labels, common.label_logps)
    want = torch.nn.functional.linear(*exact_inputs).log_softmax(1)[torch.arange(1000), labels]
    grads, want_grads = (torch.autograd.grad(y.sum(), x) for y, x in ((logps, inputs), (want, exact_inputs)))
    assert logps.dtype == torch.float32 and [g.dtype for g in grads] == [torch.bfloat16] * 2
    torch.testing.assert_close(logps.double(), want, rtol=0, atol=1e-4)
    difference = grads[1].double() - want_grads[1]  # rounded once, and products' inputs
    assert difference.norm() < 4e-3 * want_grads[1].norm()
    hidden.requires_grad_()  # a frozen head, as LoRA's
    common.ChunkedHead.apply(hidden, weight, labels, common.label_logps).sum().backward()
    assert weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_gradient_checkpointing_changes_nothing(kind):
    model, batch = tiny(kind), batch_of(random_pairs(5, 3))
    choose_forward_pass(model)
    want = gradient(model, token_logps(model, batch).flatten())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(model, token_logps(model, batch).flatten()), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_change_nothing(checkpointing, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without C++
    torch._dynamo.reset()
    tiny("mistral").save_pretrained(tmp_path)
    settings = {"dtype": "float64", "gradient_checkpointing": checkpointing}
    plain, compiled = (
        common.load_model(str(tmp_path), args, torch.device("cpu"), trainable=True)
        for args in (common.Arguments(str(tmp_path), **settings, torch_compile=on) for on in (False, True))
    )
    for seed in (3, 4):  # of the same number of pairs, but other lengths
        batch, graphs, grads = batch_of(random_pairs(seed, 4)), unique_graphs(), []
        for model in (compiled, plain):
            logps = of_completions(model.token_logps(batch), batch)
            (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
            grads.append(torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]))
            model.zero_grad()
        torch.testing.assert_close(*grads, rtol=0, atol=1e-11)
    assert unique_graphs() == graphs > 0  # the second batch needed no new ones
    args = common.Arguments(max_new_tokens=5)
    prompts, tokenizer = [[3, 4, 5], [6]], SimpleNamespace(eos_token_id=None, pad_token_id=0)
    answers = [common.generate(m, tokenizer, prompts, args, do_sample=False) for m in (compiled, plain)]
    assert answers[0] == answers[1] and unique_graphs() == graphs


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_another_function_of_logits_and_labels(kind):
    """As WPO's: two values for each label, from one pass through the head."""
    model, pairs = tiny(kind), random_pairs(6, 2)
    choose_forward_pass(model)
    batch = batch_of(pairs)
    logps, weights = dpo.token_logps_and_pair_weights(model_with_method(model), batch)
    torch.testing.assert_close(logps, token_logps(model, batch), rtol=0, atol=1e-12)
    want = []
    for prompt, *completions in pairs:
        factors = []
        for y in completions:
            probs = model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            chosen = probs[torch.arange(len(y)), torch.tensor(y)]
            factors.append((chosen / (probs**2).sum(-1)).log().mean().exp())
        want.append((factors[0] * factors[1]).clamp(max=1))
    torch.testing.assert_close(weights, torch.stack(want).detach(), rtol=0, atol=1e-10)
    assert not weights.requires_grad and len({*weights.tolist()}) == 2


def model_with_method(model):
    model.token_logps = MethodType(token_logps, model)
    return model


def test_a_mixture_of_experts_with_a_router_loss_runs_padded_with_its_own_loss():
    model, pairs = tiny("mixtral", output_router_logits=True), random_pairs(7, 3)
    choose_forward_pass(model)
    assert model.forward_pass == "padded"
    batch = batch_of(pairs)
    token_logps(model, batch)
    want = model(**batch.inputs, output_router_logits=True).aux_loss
    torch.testing.assert_close(model.router_loss, want, rtol=0, atol=1e-12)
    assert want > 0


def test_a_mixture_of_experts_with_a_router_loss_generates_padded_prompts():
    model, tokenizer = tiny("mixtral", output_router_logits=True), SimpleNamespace(eos_token_id=2)
    choose_forward_pass(model)
    args = SimpleNamespace(max_new_tokens=3, generation_batch_size=2, bf16=False)
    answers = common.generate(model, tokenizer, [[3, 4, 5], [6]], args, do_sample=False)
    assert answers == [
        common.generate(model, tokenizer, [p], args, do_sample=False)[0] for p in ([3, 4, 5], [6])
    ]
    assert model.config.output_router_logits


@pytest.mark.parametrize("window", [None, 40])
def test_a_model_whose_window_is_only_in_a_mask_is_padded(window, capsys):
    """Qwen2-MoE does not tell its attention function. The window is longer than the rows of the check."""
    options = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, initializer_range=0.2)
    options |= dict(use_sliding_window=bool(window), sliding_window=window, max_window_layers=0)
    config = Qwen2MoeConfig(**SMALL | options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")
    choose_forward_pass(model.train())
    assert model.forward_pass == ("padded" if window else "packed")
    batch = batch_of(random_pairs(3, 4, low=50, high=60))
    difference = (token_logps(model, batch) - common.plain_token_logps(model, batch)).abs().max().item()
    assert difference < 1e-10


def test_a_model_in_float16_is_packed():
    model = tiny("llama", num_hidden_layers=8).half()
    choose_forward_pass(model)
    assert model.forward_pass == "packed"


@pytest.mark.parametrize("forward_pass", ["packed", "padded"])
def test_a_batch_of_no_pairs_contributes_nothing_but_runs_the_model(forward_pass):
    model = tiny("llama")
    choose_forward_pass(model)
    model.forward_pass = forward_pass
    logps = token_logps(model, batch_of([])).sum(1).view(-1, 2)
    assert logps.shape == (0, 2)
    logps.sum().backward()  # as FSDP needs it: every process has a gradient to add
    assert all((p.grad == 0).all() for p in model.parameters())
