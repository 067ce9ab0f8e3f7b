"""Talk to a trained model: python tests/bench/chat.py output/Qwen2-0.5B-dpo

Each line is a turn of one conversation; an empty line ends it. A model without a chat template gets the text
as it is, and continues it.
"""

import sys

from transformers import pipeline


def main(folder: str) -> None:
    generate, messages = pipeline("text-generation", folder), []
    while text := input("> "):
        if generate.tokenizer.chat_template is None:
            print(generate(text, max_new_tokens=256)[0]["generated_text"])
            continue
        messages.append({"role": "user", "content": text})
        messages = generate(messages, max_new_tokens=256)[0]["generated_text"]
        print(messages[-1]["content"])


if __name__ == "__main__":
    main(*sys.argv[1:])
