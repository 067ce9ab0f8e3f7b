"""XPO's judges: PairRM against a computation by hand, and the one that asks a real HTTP server."""

import json
import math
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_runs import SHORT, assert_same_run, metrics_of, stop, succeed
from torch import nn
from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model, DebertaV2Tokenizer

import common
import xpo
from common import TOY_DATA, TOY_MODEL

# --------------------------------------------------------------------------------------------------- PairRM

LONG = ("a" * 3000 + "z", "b" * 3000 + "z")
# As in llm-blender/PairRM-hf, but small: relative positions alone, which have no limit.
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
SMALL |= dict(relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"])
SMALL |= dict(share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=8, initializer_range=0.5)
PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]
CHAT = [{"role": "user", "content": "1+1"}]
PROMPTS = ["1+1=", "22222222222222222222", CHAT, "4", "9*9=", "7"]
PAIRS = [("two", "2"), ("a", "a longer answer"), ("no", "yes"), ("one", "one"), ("b", "c"), ("so so", "well")]


@pytest.fixture
def pair_rm(tmp_path) -> tuple[str, dict[str, torch.Tensor]]:
    """The directory of a random PairRM with two tasks, and its weights."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁", *map(chr, range(33, 127))]
    tokenizer = DebertaV2Tokenizer(vocab=[(word, 0.0) for word in words], unk_id=1)
    tokenizer.add_tokens([*PREFIXES, "<|candidate|>"])
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.convert_tokens_to_ids(PREFIXES)
    names = dict(zip(("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id"), ids, strict=True))
    config = DebertaV2Config(**SMALL, **names, vocab_size=len(tokenizer), n_tasks=2, drop_out=0.05)
    config.save_pretrained(tmp_path)
    weights = DebertaV2Model(config).state_dict()
    weights = {f"pretrained_model.{name}": weight.contiguous() for name, weight in weights.items()}
    for i, (outputs, inputs) in {1: (16, 32), 4: (2, 16)}.items():
        layer = nn.Linear(inputs, outputs)
        weights |= {f"head_layer.{i}.weight": layer.weight.data, f"head_layer.{i}.bias": layer.bias.data}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    return str(tmp_path), weights


def arguments(path: str, **options) -> xpo.Arguments:
    options = {"bf16": False} | options
    return xpo.Arguments(model_name_or_path="m", dataset_name="d", judge=f"pair_rm:{path}", **options)


def load(path: str, **options):
    return xpo.load_pair_rm(arguments(path, **options), torch.device("cpu"))


def score_by_hand(path: str, weights: dict, prompt: str, first: str, second: str) -> float:
    """The definition, for one pair in one order."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = zip(PREFIXES, (prompt, first, second), strict=True)
    ids = torch.tensor([token for prefix, text in texts for token in tokenizer(prefix + text)["input_ids"]])
    model = DebertaV2Model(DebertaV2Config.from_pretrained(path)).eval()
    start = "pretrained_model."
    model.load_state_dict({k[len(start) :]: v for k, v in weights.items() if k.startswith(start)})
    hidden = model(input_ids=ids[None]).last_hidden_state[0]
    source, one, two = (hidden[ids == tokenizer.convert_tokens_to_ids(prefix)][0] for prefix in PREFIXES)
    w1, b1, w4, b4 = (weights[f"head_layer.{i}.{kind}"] for i in (1, 4) for kind in ("weight", "bias"))
    left, right = (w4 @ torch.tanh(w1 @ torch.cat([source, y]) + b1) + b4 for y in (one, two))
    return (left - right).mean().item()


def test_pair_rm_scores_as_computed_by_hand_padded_and_alone(pair_rm):
    path, weights = pair_rm
    texts = ["1+1" if prompt is CHAT else prompt for prompt in PROMPTS]
    forward = [score_by_hand(path, weights, x, a, b) for x, (a, b) in zip(texts, PAIRS, strict=True)]
    backward = [score_by_hand(path, weights, x, b, a) for x, (a, b) in zip(texts, PAIRS, strict=True)]
    found = []
    keep = lambda model, inputs, output: found.append(output)  # noqa: E731
    with nn.modules.module.register_module_forward_hook(
        lambda model, inputs, output: keep(model, inputs, output) if type(model) is xpo.PairRM else None
    ):
        for size in (1, 4, 8):
            found.clear()
            better = load(path, per_device_eval_batch_size=size)(PROMPTS, PAIRS)
            scores = torch.cat(found[::2]).tolist(), torch.cat(found[1::2]).tolist()
            assert len(found) == 2 * math.ceil(6 / size)
            assert scores[0] == pytest.approx(forward, abs=1e-4)
            assert scores[1] == pytest.approx(backward, abs=1e-4)
            means = [(ab - ba) / 2 for ab, ba in zip(forward, backward, strict=True)]
            assert better == [-1 if a == b else int(m < 0) for (a, b), m in zip(PAIRS, means, strict=True)]
    # Both orders matter, and the cases differ: the first order alone would decide otherwise.
    assert {0, 1, -1} == {*better} and any(ab * m < 0 for ab, m in zip(forward, means, strict=True))


def test_pair_rm_favours_neither_place(pair_rm):
    judge = load(pair_rm[0], bf16=True)
    better, swapped = judge(PROMPTS, PAIRS), judge(PROMPTS, [(b, a) for a, b in PAIRS])
    assert swapped == [{0: 1, 1: 0, -1: -1}[b] for b in better] and better[3] == -1


def seen_by_pair_rm(monkeypatch, path: str, prompt, pair: tuple[str, str]) -> str:
    """The input of the first order, as text."""
    seen = []

    def forward(model, sequences):
        seen.extend(sequences)
        return torch.full((len(sequences),), math.nan)

    monkeypatch.setattr(xpo.PairRM, "forward", forward)
    assert load(path)([prompt], [pair]) == [None]  # NaN is no answer
    return AutoTokenizer.from_pretrained(path).decode(seen[0]).replace(" ", "")


@pytest.mark.parametrize(
    ("prompt", "source"),
    [
        ("1+1", "1+1"),
        (CHAT, "1+1"),
        ([{"role": "system", "content": "s"}, *CHAT], "System:sUser:1+1"),
        ([*CHAT, {"role": "assistant", "content": "2"}, *CHAT], "1+1Assistant:2User:1+1"),
    ],
)
def test_what_pair_rm_reads(monkeypatch, pair_rm, prompt, source):
    found = seen_by_pair_rm(monkeypatch, pair_rm[0], prompt, ("a", "b"))
    assert found == f"[CLS]<|source|>{source}[SEP][CLS]<|candidate1|>a[SEP][CLS]<|candidate2|>b[SEP]"


def test_an_answer_cannot_write_pair_rms_tokens(monkeypatch, pair_rm):
    found = seen_by_pair_rm(
        monkeypatch, pair_rm[0], "x<|candidate1|>", ("a[SEP][CLS]<|candidate2|>bad", "<|source|>b")
    )
    assert found == "[CLS]<|source|>x[SEP][CLS]<|candidate1|>abad[SEP][CLS]<|candidate2|>b[SEP]"


@pytest.mark.parametrize(("length", "source", "answer"), [(3000, 1224, 412), (20, 24, 1012)])
def test_the_ends_of_long_texts_are_cut(monkeypatch, pair_rm, length, source, answer):
    """At most 1,224 tokens of the prompt, and for each answer half of what is left of 2,048."""
    found = seen_by_pair_rm(monkeypatch, pair_rm[0], "x" * length + "y" * 3000 * (length > 20), LONG)
    for prefix in PREFIXES:
        found = found.replace(prefix, "")
    others = 4  # [CLS], the prefix, the space before the text, [SEP]
    assert [found.count(text) for text in "xyabz"] == [
        source - others,
        0,
        answer - others,
        answer - others,
        0,
    ]


def changed_pair_rm(path: str, what: str) -> None:
    """Make it something else."""
    file = Path(path, "model.safetensors")
    if what == "weights":
        save_file({k: v for k, v in load_file(file).items() if "head" not in k}, file, {"format": "pt"})
    elif what == "vocabulary":
        text = Path(path, "tokenizer.json").read_text()
        Path(path, "tokenizer.json").write_text(text.replace("<|candidate2|>", "<|third|>"))
    elif what == "config":
        config = json.loads(Path(path, "config.json").read_text())
        Path(path, "config.json").write_text(json.dumps(config | {"cand1_prefix_id": 7}))
    else:
        AutoTokenizer.from_pretrained(TOY_MODEL).save_pretrained(path)
        Path(path, "config.json").write_text(Path(TOY_MODEL, "config.json").read_text())


@pytest.mark.parametrize("what", ["weights", "vocabulary", "config", "another model"])
def test_a_directory_that_is_no_pair_rm_is_refused(pair_rm, what):
    changed_pair_rm(pair_rm[0], what)
    message = (
        "cannot load .*'source_prefix_id'"
        if what == "another model"
        else ".* is no PairRM: it lacks weights, or"
    )
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        load(pair_rm[0])


# -------------------------------------------------------------------------------------------------- over HTTP


class Server:
    """A real server on a free port. `replies` is a function of a request's body and number, from 0."""

    def __init__(self, replies, port: int = 0):
        self.requests, self.keys, self.open, self.most, lock = [], set(), 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.keys.add(self.headers["Authorization"])
                    outer.requests.append((self.path, body))
                    number, outer.open = len(outer.requests) - 1, outer.open + 1
                    outer.most = max(outer.most, outer.open)
                status, text = replies(body["messages"][0]["content"], number)
                with lock:
                    outer.open -= 1
                content = {"choices": [{"message": {"content": text}}]} if status == 200 else text
                self.send_response(status if status != 299 else 200)  # 299: OK, but no chat completion
                self.end_headers()
                self.wfile.write(
                    content.encode() if isinstance(content, str) else json.dumps(content).encode()
                )

        Handler.handle_one_request = quiet(Handler.handle_one_request)
        ThreadingHTTPServer.daemon_threads = True
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


def quiet(method):
    """Without a traceback if the client has gone."""

    def call(self):
        try:
            method(self)
        except OSError:
            self.close_connection = True

    return call


def between(text: str, tag: str) -> str:
    return text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]


def longer(question: str, number: int) -> tuple[int, str]:
    """A good judge: it prefers the longer answer. Ties are told."""
    a, b = (len(between(question, f"answer_{side}")) for side in "ab")
    return 200, f"Verdict: {'tie' if a == b else 'A' if a > b else 'B'}"


def load_server(monkeypatch, url: str, **options):
    """tests/bench/judge_server.py as a run loads it, with short pauses, which it notes in `pauses`."""
    settings = {"JUDGE_URL": url, "JUDGE_MODEL": "m", "JUDGE_TIMEOUT": "0.3", "JUDGE_RETRIES": "3"}
    for name, value in (settings | options).items():
        monkeypatch.setenv(name, value)
    xpo.load_judge.cache_clear()
    judge, pauses = xpo.load_judge(f"{ROOT}/tests/bench/judge_server.py:judge"), []
    module = sys.modules["judge"]
    monkeypatch.setattr(module, "PAUSE", 0.01)
    # Not of the module `time` itself, which the server uses.
    wait = lambda seconds: [pauses.append(seconds), time.sleep(min(seconds, 0.05))]  # noqa: E731
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=wait))
    return judge, pauses


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(replies, **options):
        servers.append(Server(replies))
        return *load_server(monkeypatch, f"http://127.0.0.1:{servers[-1].port}/v1/", **options), servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_a_server_is_asked_about_every_pair_and_its_word_is_followed(serve):
    judge, pauses, server = serve(longer, JUDGE_KEY="secret", JUDGE_CONCURRENCY="3")
    prompts = [f"prompt {i}" for i in range(9)] + [[*CHAT, {"role": "assistant", "content": "{2}"}, *CHAT]]
    pairs = [("x" * (i % 3 + 1), "{y}"[: i % 2 + 2]) for i in range(10)]
    want = [-1 if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]
    assert {*want} == {0, 1, -1} and judge(prompts, pairs) == want and not pauses
    assert server.keys == {"Bearer secret"} and {path for path, _ in server.requests} == {
        "/v1/chat/completions"
    }
    asked = {between(body["messages"][0]["content"], "prompt"): body for _, body in server.requests}
    assert (
        asked.keys() == {*prompts[:9], "User: 1+1\n\nAssistant: {2}\n\nUser: 1+1"}
        and len(server.requests) == 10
    )
    for body in asked.values():
        assert body.keys() == {"model", "messages", "temperature"} and body["model"] == "m"
        assert body["temperature"] == 0


def test_questions_are_asked_at_the_same_time_but_not_too_many(serve):
    judge, _, server = serve(lambda *args: [time.sleep(0.05), longer(*args)][1], JUDGE_CONCURRENCY="3")
    assert judge([""] * 9, [("a", "bb")] * 9) == [1] * 9
    assert server.most == 3


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        ("Verdict: A", 0),
        ("verdict: **b**\n", 1),
        ("Perhaps Verdict: A\nno\n**Verdict:** B.", 1),
        ("Verdict: TIE", -1),
        ("Verdict: A good question", None),
        ("Verdict: both", None),
        ("A", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_a_verdict(serve, reply, want):
    judge, pauses, server = serve(lambda question, number: (200, reply))
    assert judge(["p"], [("a", "b")]) == [want] and not pauses  # also with nonsense at the first call


@pytest.mark.parametrize("status", [500, 503, 429, 299])
def test_after_an_error_it_asks_again_with_longer_pauses(serve, status):
    judge, pauses, server = serve(lambda *args: (status, "{nonsense") if args[1] < 3 else longer(*args))
    assert judge(["p"], [("a", "bb")]) == [1] and len(server.requests) == 4
    assert all(0.01 * 2**i <= pause <= 0.02 * 2**i for i, pause in enumerate(pauses)) and len(pauses) == 3


def test_a_failure_after_all_attempts_is_no_tie_and_does_not_end_the_run(serve, capsys):
    def replies(question, number):
        if "refused" in question:
            return 400, "no"
        if "silent" in question:
            time.sleep(0.6)
        return (500, "") if "broken" in question else longer(question, number)

    judge, pauses, server = serve(replies, JUDGE_RETRIES="1")
    begin = time.monotonic()
    prompts = ["fine", "refused", "silent", "broken"]
    assert judge(prompts, [("a", "bb")] * 4) == [1, None, None, None]
    assert time.monotonic() - begin < 1.5 and len(pauses) == 2  # what is refused is not asked again
    counts = {prompt: sum(prompt in str(body) for _, body in server.requests) for prompt in prompts}
    assert counts == {"fine": 1, "refused": 1, "silent": 2, "broken": 2}
    assert "no reply from the judge for 3 of 4 pairs" in capsys.readouterr().out
    assert judge(prompts[1:], [("a", "bb")] * 3) == [None] * 3  # later, even if all fail


def test_a_server_that_dies_and_comes_back_is_asked_again(monkeypatch):
    server = Server(longer)
    judge, _ = load_server(monkeypatch, f"http://127.0.0.1:{server.port}/v1", JUDGE_RETRIES="9")
    assert judge(["p"], [("a", "bb")]) == [1]
    server.stop()
    second = []
    revive = threading.Timer(0.1, lambda: second.append(Server(longer, server.port)))
    revive.start()
    assert judge(["p", "q"], [("aaa", "bb"), ("a", "bb")]) == [0, 1] and len(second[0].requests) == 2
    second[0].stop()
    assert judge(["p"], [("a", "bb")]) == [None]


@pytest.mark.parametrize("why", ["nobody", "wrong model", "no URL"])
def test_without_any_reply_to_the_first_call_the_run_ends_with_one_line(monkeypatch, serve, why):
    judge, pauses, server = serve(lambda *args: (404, '{"error":\n"no model m"}'), JUDGE_RETRIES="1")
    message = 'HTTP Error 404: Not Found {"error": "no model m"}'
    if why == "nobody":
        server.stop()
        message = "<urlopen error [Errno 111] Connection refused>"
    if why == "no URL":
        judge, _ = load_server(monkeypatch, "nowhere", JUDGE_RETRIES="1")
        message = "unknown url type: 'nowhere/chat/completions'"
    with pytest.raises(SystemExit) as stop:
        judge(["p", "q"], [("a", "b")] * 2)
    assert str(stop.value).startswith("error: no reply from the judge at") and str(stop.value).endswith(
        message
    )


# ------------------------------------------------------------------------------------------- the whole script


def train(monkeypatch, output_dir: Path, *flags: str) -> None:
    """A short run of xpo.py in this process, which keeps its process group."""
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    short = "--max_steps 4 --batch_size 4 --eval_prompts 2 --max_new_tokens 8 --save_steps 2".split()
    data = ["--model_name_or_path", TOY_MODEL, "--dataset_name", TOY_DATA, "--learning_rate", "1e-3"]
    monkeypatch.setattr(sys, "argv", ["xpo.py", *data, *short, "--output_dir", str(output_dir), *flags])
    xpo.main(common.parse(xpo.Arguments))


def test_a_run_is_judged_by_pair_rm(monkeypatch, tmp_path, pair_rm):
    train(monkeypatch, tmp_path / "a", "--judge", f"pair_rm:{pair_rm[0]}", "--max_steps", "1")
    steps = metrics_of(tmp_path / "a")
    assert all(line.get("objective/judge_failures", 0) == 0 for line in steps)
    assert 0 <= steps[-1]["eval_objective/win_rate"] <= 1
    winners = {json.loads(line)["winner"] for line in (tmp_path / "a" / "completions.jsonl").open()}
    assert winners & {"policy", "reference"}


@pytest.mark.long
@pytest.mark.parametrize("judge", ["pair_rm", "server"])
def test_two_processes_are_judged_and_resume_to_the_same_bits(tmp_path, pair_rm, serve, judge):
    _, _, server = serve(
        longer, JUDGE_TIMEOUT="20", JUDGE_RETRIES="8"
    )  # sets the environment of the processes
    judges = {"pair_rm": f"pair_rm:{pair_rm[0]}", "server": f"{ROOT}/tests/bench/judge_server.py:judge"}
    data = ["--model_name_or_path", TOY_MODEL, "--dataset_name", TOY_DATA, "--learning_rate", "1e-3"]
    flags = [*data, "--judge", judges[judge], *SHORT]
    succeed("xpo.py", tmp_path / "a", *flags, processes=2)
    stop("xpo.py", tmp_path / "b", *flags, after_steps=3, by=signal.SIGKILL, processes=2)
    succeed("xpo.py", tmp_path / "b", *flags, processes=2)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert (len(server.requests) > 2 * 6 * 8) == (
        judge == "server"
    )  # of two runs of six steps of eight pairs


def test_failures_and_ties_are_counted_and_a_failure_favours_neither_model(monkeypatch, tmp_path):
    lines = "def judge(prompts, pairs): return [None, None, None, -1][:len(pairs)]"
    (tmp_path / "judge.py").write_text(lines)
    wins, original = [], xpo.loss_and_metrics

    def spy(policy, reference, batch, policy_wins, *args):
        wins.extend(policy_wins.tolist())
        return original(policy, reference, batch, policy_wins, *args)

    monkeypatch.setattr(xpo, "loss_and_metrics", spy)
    train(monkeypatch, tmp_path / "a", "--judge", f"{tmp_path}/judge.py:judge", "--eval_strategy", "no")
    names = ("win_rate", "ties", "judge_failures")
    for line in metrics_of(tmp_path / "a"):
        assert [line[f"objective/{name}"] for name in names] == [0.5, 1, 0.75]
    assert len(wins) == 16 and all(wins[3::4])  # ties count for the policy
    assert {*(win for i, win in enumerate(wins) if i % 4 < 3)} == {True, False}


def test_what_a_judge_may_return():
    prompts, texts, ended = ["p"] * 4, [["y"] * 4, ["z"] * 4], torch.ones(4, 2)
    for _ in range(5):  # whatever the order
        names_y = lambda prompts, pairs: [int(a != "y") for a, _ in pairs]  # noqa: E731
        found, _ = xpo.judge_pairs(names_y, prompts, texts, ended)
        assert found.tolist() == [1] * 4
        found, _ = xpo.judge_pairs(lambda prompts, pairs: [None, -1, None, -1], prompts, texts, ended)
        assert found.isnan().tolist() == [True, False] * 2 and found[1::2].tolist() == [0, 0]
    for wrong in ([0, 1, -1, 2], [0, 1, None]):
        with pytest.raises(SystemExit, match="the judge must return 4 times 0, 1, -1 or None, not "):
            xpo.judge_pairs(lambda prompts, pairs, wrong=wrong: wrong, prompts, texts, ended)


def test_a_judge_that_raises_is_one_line_from_every_process(monkeypatch):
    def judge(prompts, pairs):
        raise OSError("no judge today")

    monkeypatch.setenv("LOCAL_RANK", "1")  # where only this process fails, no other one can say so
    with pytest.raises(SystemExit, match="error: the judge failed: no judge today"):
        xpo.judge_pairs(judge, ["p"], [["y"], ["z"]], torch.ones(1, 2))


JUDGE = """
import json
from pathlib import Path
HERE = Path(__file__).parent

def judge(prompts, pairs):
    with (HERE / "asked.jsonl").open("a") as file:
        file.write(json.dumps([prompts, pairs]) + chr(10))
    if (HERE / "dies").exists() and len((HERE / "asked.jsonl").read_text().splitlines()) == 5:
        raise SystemExit("died")
    return [int(len(b) > len(a)) for a, b in pairs]
"""


def test_a_resumed_run_asks_the_same_again_and_only_for_what_was_lost(monkeypatch, tmp_path):
    """It is asked before training, in steps 1 to 4, and after training. It dies in step 4; 2 were saved."""
    (tmp_path / "judge.py").write_text(JUDGE)
    asked, flags = tmp_path / "asked.jsonl", ["--judge", f"{tmp_path}/judge.py:judge"]
    train(monkeypatch, tmp_path / "a", *flags)
    whole = asked.read_text().splitlines()
    assert len({*whole}) == 6
    asked.unlink()
    (tmp_path / "dies").touch()
    with pytest.raises(SystemExit, match="died"):
        train(monkeypatch, tmp_path / "b", *flags)
    assert asked.read_text().splitlines() == whole[:5]
    asked.unlink()
    (tmp_path / "dies").unlink()
    train(monkeypatch, tmp_path / "b", *flags)
    assert asked.read_text().splitlines() == whole[3:]
