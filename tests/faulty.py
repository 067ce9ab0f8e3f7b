"""Runs a script with a fault in it: FAULT=JSON python tests/faulty.py dpo.py flags...

FAULT has `where`, one of PLACES, and either `signal`, sent to this process, or with `who` "all" to those of
the run, at the `event`-th function call inside the `call`-th call of it; or `value`, which the loss of
loss_and_metrics is multiplied by in the `calls` given. `rank` says in which process, `restart` in which start
by torchrun. Without FAULT, the function calls inside each call are counted, and written to the file COUNTS.

Without arguments it reads lines of JSON, each with argv, environment and a file for the output, runs each in
a fork, which saves the time of imports, and answers with the exit status.
"""

import importlib
import json
import os
import runpy
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402

PLACES = {
    "load_data": common,
    "clip_grad_norm_": torch.nn.utils,  # once a step
    "load_model": common,
    "resume": common,
    "save_checkpoint": common,
    "rmtree": shutil,  # of pruning
    "save_model": common,
    "complete": common,
    "generate": common,
    "precompute": None,  # None: the script
    "evaluate": None,
    "sample": None,
    "loss_and_metrics": None,
}


def processes_of_run() -> list[int]:
    """Those that torchrun started, and itself; or this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return [os.getpid()]
    stats = [path.read_text().rsplit(")", 1) for path in Path("/proc").glob("[0-9]*/stat")]
    siblings = [int(name.split()[0]) for name, rest in stats if int(rest.split()[1]) == os.getppid()]
    return [os.getppid(), *(pid for pid in siblings if pid != os.getpid()), os.getpid()]


def instrument(module, name: str, fault: dict, counts: dict[str, list[int]]) -> None:
    function = getattr(module, name)
    counts[name] = []

    def instrumented(*args, **kwargs):
        if sys.getprofile():  # inside another call that is being counted
            return function(*args, **kwargs)
        counts[name].append(0)
        call = len(counts[name])
        if fault.get("where") == name and call in fault.get("calls", []):
            loss, metrics = function(*args, **kwargs)
            return loss * fault["value"], metrics

        def on_event(frame, event, argument) -> None:
            if not event.endswith("call"):
                return
            counts[name][-1] += 1
            if (fault.get("where"), fault.get("call")) == (name, call) and counts[name][-1] == fault["event"]:
                sys.setprofile(None)
                for pid in processes_of_run() if fault.get("who") == "all" else [os.getpid()]:
                    os.kill(pid, getattr(signal, fault["signal"]))

        sys.setprofile(on_event)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(None)

    setattr(module, name, instrumented)


def serve() -> None:
    for name in importlib.import_module("conftest").METHODS:
        importlib.import_module(name)  # for what it imports
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run(argv: list[str], environment: dict[str, str], output: str) -> None:
    """As the interpreter runs a script, in this process, which ends with it."""
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv, status = ["", *argv], 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int | None) else 1
        print("" if isinstance(stop.code, int | None) else stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    del sys.argv[0]
    fault, counts = json.loads(os.environ.get("FAULT", "{}")), {}
    rank, restart = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    start = common.start

    def instrument_and_start(args):
        """In place of common.start, with which main begins: by now the script's functions are defined."""
        if (rank, restart) == (str(fault.get("rank", 0)), str(fault.get("restart", 0))):
            for name, module in PLACES.items():
                module = module or sys.modules["__main__"]
                if hasattr(module, name) and fault.get("where", name) == name:
                    instrument(module, name, fault, counts)
        return start(args)

    common.start = instrument_and_start
    runpy.run_path(sys.argv[0], run_name="__main__")
    if "COUNTS" in os.environ and rank == "0":
        Path(os.environ["COUNTS"]).write_text(json.dumps(counts))


if __name__ == "__main__":
    main() if sys.argv[1:] else serve()
