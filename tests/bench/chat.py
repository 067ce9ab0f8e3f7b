"""Talk to a trained model: python tests/bench/chat.py output/Qwen2-0.5B-dpo

Each line is a turn of one conversation; an empty line or the end of the input ends it. A model without a chat
template gets the text as it is, and continues it. Answers are greedy: the likeliest token each time.
"""

import sys
from pathlib import Path

from transformers import pipeline


def main(folder: str = "") -> None:
    if not any(Path(folder, name).exists() for name in ("config.json", "adapter_config.json")):
        raise SystemExit(f"{folder or '(nothing)'} is not the directory of a trained model\n\n{__doc__}")
    generate, messages = pipeline("text-generation", folder), []
    print("an empty line ends the conversation")
    while text := ask():
        if generate.tokenizer.chat_template is None:
            print(generate(text, max_new_tokens=256, do_sample=False)[0]["generated_text"])
            continue
        messages.append({"role": "user", "content": text})
        messages = generate(messages, max_new_tokens=256, do_sample=False)[0]["generated_text"]
        print(messages[-1]["content"])


def ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
