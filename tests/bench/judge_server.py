"""A judge for xpo.py that asks a server with OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenAI, ...

    export JUDGE_URL=http://localhost:8000/v1 JUDGE_MODEL=Qwen/Qwen3-32B
    python xpo.py --judge tests/bench/judge_server.py:judge --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback-prompt

Copy this file to ask in another way. It asks once for each pair, because xpo.py gives the two answers in
random order. After an error it asks again, with longer and longer pauses. If that does not help, or if the
reply has no verdict, the pair is a failure, which objective/judge_failures counts, and training goes on. Only
a first call without any reply ends the run. JUDGE_KEY is the server's API key, if it wants one.
"""

import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import common

PROMPT = """Two assistants have answered the same prompt. Decide which answer is better: which one does what \
was asked, is right, and is clear. Neither a longer answer nor the one that comes first is better for that.

<prompt>
{prompt}
</prompt>

<answer_a>
{a}
</answer_a>

<answer_b>
{b}
</answer_b>

Reply with one line, "Verdict: A" or "Verdict: B", or, if neither is better, "Verdict: tie"."""
VERDICT = re.compile(r"verdict\W*\b(a|b|tie)\W*$", re.IGNORECASE | re.MULTILINE)
OPTIONS = {"temperature": 0}  # of the request; some models want others

URL, MODEL = (os.environ.get(name, "").rstrip("/") for name in ("JUDGE_URL", "JUDGE_MODEL"))
KEY = os.environ.get("JUDGE_KEY")
TIMEOUT = float(os.environ.get("JUDGE_TIMEOUT", 60))  # seconds without a word from the server
CONCURRENCY = int(os.environ.get("JUDGE_CONCURRENCY", 16))  # questions of a process at a time
RETRIES = int(os.environ.get("JUDGE_RETRIES", 5))
PAUSE = 1.0  # seconds before the first retry, at least; each further pause is twice as long
FINAL = (400, 401, 403, 404, 422)  # errors that a retry does not mend
if not (URL and MODEL):
    raise ValueError("tests/bench/judge_server.py needs the environment variables JUDGE_URL and JUDGE_MODEL")
reached = False  # whether the server has ever replied


def ask(prompt, pair: tuple[str, str]) -> int | None | Exception:
    """The judge's word on one pair, as in xpo.load_judge, or the error of the last attempt."""
    if isinstance(prompt, list):
        prompt = "\n\n".join(f"{turn['role'].capitalize()}: {turn.get('content', '')}" for turn in prompt)
    message = {"role": "user", "content": PROMPT.format(prompt=prompt, a=pair[0], b=pair[1])}
    body = json.dumps({"model": MODEL, "messages": [message]} | OPTIONS).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {KEY}"} if KEY else {})
    for attempt in range(RETRIES + 1):
        try:
            with urlopen(Request(f"{URL}/chat/completions", body, headers), timeout=TIMEOUT) as response:
                reply = json.load(response)["choices"][0]["message"]["content"] or ""
            verdicts = VERDICT.findall(reply)
            return {"a": 0, "b": 1, "tie": -1}[verdicts[-1].lower()] if verdicts else None
        except Exception as error:  # of any kind: no error may end the training
            failure = error
        if attempt == RETRIES or isinstance(failure, HTTPError) and failure.code in FINAL:
            return failure
        time.sleep(PAUSE * 2**attempt * random.uniform(1, 2))  # at random, so that not all return at once


def judge(prompts: list, pairs: list[tuple[str, str]]) -> list[int | None]:
    global reached
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        words = [*pool.map(ask, prompts, pairs)]
    failures = [word for word in words if isinstance(word, Exception)]
    reached = reached or len(failures) < len(words)
    if not reached:
        detail = failures[0].read(300).decode(errors="replace") if isinstance(failures[0], HTTPError) else ""
        common.fail(" ".join(f"no reply from the judge at {URL}: {failures[0]} {detail}".split()), alone=True)
    if failures:
        common.say(f"no reply from the judge for {len(failures)} of {len(words)} pairs: {failures[0]}")
    return [None if isinstance(word, Exception) else word for word in words]
