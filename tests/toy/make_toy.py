"""Make the built-in example, machine translation in miniature: numbers to English words.

    python tests/toy/make_toy.py           all of it, in about four minutes on one core
    python tests/toy/make_toy.py reward    only the reward model, from the sft/ that is there

It writes next to itself:

    sft/               a 336k-parameter character-level Llama and its tokenizer, trained on noisy translations
    pairs/train.jsonl  2,000 preference pairs: a perfect translation is chosen over an imperfect one
    pairs/test.jsonl   the same for 500 numbers that neither sft/ nor the training pairs have seen
    pairs/validation.jsonl   50 of these, for tests that evaluate often
    reward/            the same Llama with a score for a head, for online methods: 1 for perfect texts,
                       0.5 for adequate ones, 0 for wrong ones

The translators that the model imitates are perfect 30% of the time, adequate 55% and wrong 15%. Imitation is
thus capped: the model knows the perfect form but seldom says it. Preference optimization can close the gap,
and since the truth is computable, how far it does so is measured, not judged. Every draw is seeded: the pairs
are the same on every machine, the weights on machines that round alike.
"""

import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
ONES += ["twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
HELD_OUT = sorted(random.Random(7).sample(range(10_000), 500))
TRAIN = sorted(set(range(10_000)) - set(HELD_OUT))


def perfect(n: int) -> str:
    """British English with hyphens: 3942 is three thousand nine hundred and forty-two."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + ("-" + ONES[n % 10] if n % 10 else "")
    if n < 1000:
        return ONES[n // 100] + " hundred" + (" and " + perfect(n % 100) if n % 100 else "")
    link = " and " if n % 1000 < 100 else " "
    return ONES[n // 1000] + " thousand" + (link + perfect(n % 1000) if n % 1000 else "")


def adequate(n: int, rng: random.Random) -> str:
    """The right number in careless English; the perfect form where there is nothing to drop (7, 5000)."""
    text = perfect(n).replace(" and ", " ")
    if rng.random() < 0.5:
        text = text.replace("-", " ")
    return text.replace("forty", "fourty").replace("ninety", "ninty") if rng.random() < 0.3 else text


def misread(n: int, rng: random.Random) -> int:
    """Another number: one digit differs."""
    digits, place = list(str(n)), rng.randrange(len(str(n)))
    digits[place] = rng.choice("123456789".replace(digits[place], ""))
    return int("".join(digits))


def wrong(n: int, rng: random.Random) -> str:
    """Another number in careless English."""
    return adequate(misread(n, rng), rng)


def is_adequate(n: int, text: str) -> bool:
    """Whether the text means n, perfectly or carelessly written."""
    text = text.replace("fourty", "forty").replace("ninty", "ninety")
    return text.replace(" and ", " ").replace("-", " ") == perfect(n).replace(" and ", " ").replace("-", " ")


def turn(role: str, content: int | str) -> list[dict[str, str]]:
    return [{"role": role, "content": str(content)}]


def make_pair(n: int, rng: random.Random) -> dict:
    """Three in four rejected answers are adequate, the others wrong; none is perfect."""
    chosen = rejected = perfect(n)
    while rejected == chosen:
        rejected = adequate(n, rng) if rng.random() < 0.75 else wrong(n, rng)
    pair = {"prompt": turn("user", n), "chosen": turn("assistant", chosen)}
    return pair | {"rejected": turn("assistant", rejected), "answer": chosen}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character. A conversation is <s>3942=three thousand nine hundred and forty-two</s>."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *"0123456789abcdefghijklmnopqrstuvwxyz -="]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts a space between tokens
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    # The template ignores add_generation_prompt: the "=" that ends a user turn already asks for an answer.
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token + message.content + '=' }}"
        "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
    )
    more = {"chat_template": template, "clean_up_tokenization_spaces": False, "model_max_length": 128}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials, **more)


def sft(tokenizer, steps: int = 1200, batch_size: int = 64, lr: float = 5e-3) -> LlamaForCausalLM:
    """Train a model from random weights to say what the noisy translators say."""
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "tie_word_embeddings": True}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ["bos", "eos", "pad"]}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / 50) * (1 - t / steps))
    rng = random.Random(0)
    for _ in range(steps):
        chats = []
        for n in rng.choices(TRAIN, k=batch_size):
            answers = [perfect(n), adequate(n, rng), wrong(n, rng)]
            chats.append(turn("user", n) + turn("assistant", rng.choices(answers, [0.30, 0.55, 0.15])[0]))
        ids = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt").input_ids  # (B, T)
        # The answer is what follows "="; its "</s>" is learned too, the padding is not.
        in_answer = (ids == tokenizer.convert_tokens_to_ids("=")).cumsum(1)[:, :-1] > 0
        learned = in_answer & (ids[:, 1:] != tokenizer.pad_token_id)  # (B, T - 1)
        logits = model(ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits[learned], ids[:, 1:][learned]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def translate(model: LlamaForCausalLM, tokenizer, numbers: list[int], **sampling) -> list[str]:
    """Generated answers. Prompts are padded on the left, so that every answer follows its "=" at once."""
    padding = {"padding": True, "return_tensors": "pt", "tokenizer_kwargs": {"padding_side": "left"}}
    inputs = tokenizer.apply_chat_template([turn("user", n) for n in numbers], **padding)
    ids = model.generate(**inputs, max_new_tokens=64, **sampling)
    return tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def spellings(n: int) -> list[str]:
    """All texts that mean n: first the perfect one, then the adequate ones, up to seven."""
    texts = [perfect(n)]
    for right, careless in {" and ": " ", "-": " ", "forty": "fourty", "ninety": "ninty"}.items():
        texts += [text.replace(right, careless) for text in texts if right in text]
    return texts


def grades(n: int, text: str) -> list[float]:
    """A grade for each character of the text, "</s>" included: how good the answer can still become.

    1 while it begins like the perfect answer, 0.5 like an adequate one, 0 like none. Before "</s>" it is
    one less: an answer that breaks off is never better than a wrong one.
    """
    best, *others = (spelling + "." for spelling in spellings(n))  # "." stands for "</s>"
    beginnings = [(text + ".")[:length] for length in range(1, len(text) + 2)]
    values = [1 if best.startswith(b) else 0.5 * any(o.startswith(b) for o in others) for b in beginnings]
    return [value - 1 for value in values[:-1]] + values[-1:]


def reward(tokenizer, steps: int = 500, batch_size: int = 72, lr: float = 1e-3) -> None:
    """Train a reward model from the weights of sft/, on texts about training numbers."""
    rng = random.Random(2)
    numbers = rng.sample(TRAIN, 2000)
    language_model = LlamaForCausalLM.from_pretrained(HERE / "sft")
    samples = dict(
        zip(numbers, translate(language_model, tokenizer, numbers, do_sample=True, top_k=0), strict=True)
    )
    model = LlamaForSequenceClassification.from_pretrained(HERE / "sft", num_labels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / 50) * (1 - t / steps))
    for _ in range(steps):
        chats, targets = [], []
        for n in rng.choices(numbers, k=batch_size):
            swapped = int("".join(rng.sample(str(n), len(str(n)))))  # its digits in another order
            cut = perfect(n)[: rng.randrange(len(perfect(n)))]
            texts = [perfect(n), rng.choice(spellings(n)), samples[n], cut]
            texts += [rng.choice(spellings(other)) for other in (misread(n, rng), swapped)]
            text = rng.choices(texts, [2, 2, 2, 2, 3, 2])[0]
            chats.append(turn("user", n) + turn("assistant", text))
            targets += grades(n, text)
        ids = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt").input_ids  # (B, T)
        # Only the score of the last token is used later. But "wrong" after forty characters does not tell
        # which one was wrong: so every character is graded, and the last once more.
        in_answer = (ids == tokenizer.convert_tokens_to_ids("=")).cumsum(1)[:, :-1] > 0
        graded = F.pad(in_answer, (1, 0)) & (ids != tokenizer.pad_token_id)  # (B, T)
        scores = model.score(model.model(ids, use_cache=False).last_hidden_state).squeeze(-1)  # (B, T)
        errors = (scores[graded] - torch.tensor(targets)) ** 2
        last = ids[graded] == tokenizer.eos_token_id
        (errors.mean() + 0.2 * errors[last].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(HERE / "reward")
    model.to(torch.bfloat16).save_pretrained(HERE / "reward")


@torch.no_grad()
def check_reward(tokenizer) -> None:
    """Print how often the better of two answers to a held-out number gets the higher score."""
    model = LlamaForSequenceClassification.from_pretrained(HERE / "reward", dtype=torch.float32)
    language_model = LlamaForCausalLM.from_pretrained(HERE / "sft")
    rng = random.Random(3)
    made = [[write(n, rng) for n in HELD_OUT] for write in (lambda n, _: perfect(n), adequate, wrong)]
    sampled = [translate(language_model, tokenizer, HELD_OUT, do_sample=True, top_k=0) for _ in range(4)]
    for source, answers in {"made": made, "sampled": sampled}.items():
        truth, scores = [], []
        for row in answers:
            chats = [turn("user", n) + turn("assistant", text) for n, text in zip(HELD_OUT, row, strict=True)]
            scores.append(
                model(**tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt")).logits[:, 0]
            )
            truth.append(torch.tensor([grades(n, text)[-1] for n, text in zip(HELD_OUT, row, strict=True)]))
        truth, scores = torch.stack(truth), torch.stack(scores)
        for better, worse in ((1, 0.5), (0.5, 0), (1, 0)):
            pairs = (truth[:, None] == better) & (truth[None] == worse)
            right = (scores[:, None] > scores[None])[pairs].float().mean()
            print(f"held-out, {source}: answers graded {better} and {worse}, ordered rightly: {right:.3f}")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the order of additions, and so the weights, must not depend on the core count
    tokenizer = make_tokenizer()
    if "reward" not in sys.argv[1:]:
        make_sft_and_pairs(tokenizer)
    reward(tokenizer)
    check_reward(tokenizer)


def make_sft_and_pairs(tokenizer) -> None:
    (HERE / "pairs").mkdir(exist_ok=True)
    rng = random.Random(1)
    for split, numbers in {"train": rng.sample(TRAIN, 2000), "test": HELD_OUT}.items():
        lines = [json.dumps(make_pair(n, rng)) + "\n" for n in numbers]
        (HERE / "pairs" / f"{split}.jsonl").write_text("".join(lines))
    (HERE / "pairs" / "validation.jsonl").write_text("".join(lines[::10]))
    model = sft(tokenizer)
    tokenizer.save_pretrained(HERE / "sft")
    model.save_pretrained(HERE / "sft")
    greedy = translate(model, tokenizer, HELD_OUT, do_sample=False)
    sampled = translate(model, tokenizer, HELD_OUT, do_sample=True, top_k=0)
    print("held-out, greedy: perfect", sum(map(str.__eq__, greedy, map(perfect, HELD_OUT))) / 500)
    print("held-out, sampled: perfect", sum(map(str.__eq__, sampled, map(perfect, HELD_OUT))) / 500)
    print("held-out, sampled: perfect or adequate", sum(map(is_adequate, HELD_OUT, sampled)) / 500)


if __name__ == "__main__":
    main()
