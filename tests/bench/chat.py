"""Talk to a trained model: python tests/bench/chat.py output/Qwen2-0.5B-dpo

Each line is a turn of one conversation. "/new" begins another conversation; an empty line or the end of the
input ends the program. A model without a chat template, or any model with --text, gets the line as it is and
continues it. Answers are greedy: the likeliest token each time.
"""

import argparse
from pathlib import Path

from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", help="the directory of a trained model or adapter")
    parser.add_argument("--text", action="store_true", help="do not use the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens of an answer, at most [256]")
    args = parser.parse_args()
    if not any(Path(args.folder, name).exists() for name in ("config.json", "adapter_config.json")):
        parser.error(f"{args.folder} is not the directory of a trained model; an unfinished run has none yet")
    model, messages = pipeline("text-generation", args.folder), []
    tokenizer = model.tokenizer

    def generate(start):
        return model(start, max_new_tokens=args.max_new_tokens, do_sample=False)[0]["generated_text"]

    is_chat = tokenizer.chat_template is not None and not args.text
    how = "each line is a turn of one conversation; /new begins another one"
    print(f"{how if is_chat else 'a text to continue'}; an empty line ends the program")
    if args.text and tokenizer.bos_token and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        print(f"a text begins with {tokenizer.bos_token} only if you write it: do so if the training data do")
    while text := ask():
        if not is_chat:
            print(generate(text))
        elif text == "/new":
            messages = []
        else:
            messages = generate([*messages, {"role": "user", "content": text}])
            print(messages[-1]["content"])


def ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
