"""Times the sides of a question in turn, each in a process of its own, so that what slows the machine slows them all.

A script starts a `Worker` for each side, by its own command line with another argument, and hands them to `measure`; in
the worker's process it calls `serve` with a function that builds the ways to be timed. A way is a function that runs a
block of work and returns the seconds of a unit of it. `add_keep_memory` and `keep_memory` are for who keeps the memory
that a step frees.
"""

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

MARK = "@@"  # What a worker has to say stands in lines that begin so; the rest is its log.
# What `kt.training.keep_memory()` tells the allocator, for processes that do not have it.
KEPT = {
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_ARENA_MAX": "1",
}


def add_keep_memory(parser):
    """The option that says which sides keep what a step frees; `kept_by_all` and `keep_memory` do what it says."""
    parser.add_argument("--keep-memory", choices=("ours", "all", "none"), default="ours",
                        help="who keeps what a step frees: ours by `kt.training.keep_memory()` (default), or its peers "
                        "as well, by variables of the environment")  # fmt: skip


def kept_by_all(arguments):
    """Environment variables for every worker."""
    return KEPT if arguments.keep_memory == "all" else {}


def keep_memory(arguments):
    """What the worker's process of this library does first."""
    if arguments.side.startswith("ours") and arguments.keep_memory != "none":
        import keras_transformer

        keras_transformer.training.keep_memory()


def measure(workers, seconds, repeat, patience):
    """Times all ways of all workers in turn, again and again, each alone.

    Args:
        workers: list of `Worker`, which build and compile side by side before the first is timed.
        seconds: float. How long each turn of timing lasts, and 3 blocks at least.
        repeat: int. How many turns each way has.
        patience: float. Seconds that building and compiling may take.

    Returns:
        Dict of `"ways"`, from name to `summary`, of `"errors"` from name to text, and of `"compile_seconds"`.
    """
    result = {"ways": {}, "errors": {}, "compile_seconds": {}}
    try:
        for worker in workers:
            worker.prepare(patience, result)
        times = {}
        for _ in range(repeat):
            for worker in workers:
                for way in worker.ready:
                    found = worker.time(way, seconds, result)
                    times.setdefault(f"{worker.label}{way}", []).append(found)
    finally:
        for worker in workers:
            worker.stop()
    result["ways"] = {name: summary([turn for turn in turns if turn]) for name, turns in times.items() if any(turns)}
    return result


def summary(turns):
    """Median of seconds, first and third quartile, how many blocks, and the median of each turn."""
    times = [seconds for turn in turns for seconds in turn]
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    medians = [statistics.median(turn) for turn in turns]
    return {"seconds": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "blocks": len(times), "turns": medians}


def tell(result, path):
    """Prints a result as JSON, and writes it to a file if there is a path."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        Path(path).write_text(text + "\n")


class Worker:
    """A process that builds one side and times it when told to.

    Args:
        label: str. The side's name; those of its ways are put behind it.
        command: list of str. What follows `python` on the command line.
        environment: dict of str. Environment variables besides this process' own.
    """

    def __init__(self, label, command, environment):
        self.label, self.ready = label, []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**os.environ, **environment},
        )  # fmt: skip
        self.started, self.log, self.messages = time.perf_counter(), [], queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.messages.put(json.loads(line.removeprefix(MARK)))
            else:
                self.log = [*self.log[-20:], line.rstrip()]
        self.messages.put({"end": True})

    def _next(self, seconds):
        try:
            return self.messages.get(timeout=max(0.1, seconds))
        except queue.Empty:
            self.process.kill()
            return {"end": True, "late": True}

    def prepare(self, patience, result):
        """Waits until all ways have been run once."""
        while True:
            message = self._next(self.started + patience - time.perf_counter())
            if "end" in message:
                late = f"not ready after {patience:g} seconds; the end of its log: " if message.get("late") else ""
                result["errors"][self.label] = late + " | ".join(self.log[-6:])
                self.ready = []
                return
            if "prepared" in message:
                return
            name = f"{self.label}{message['way']}"
            if "error" in message:
                result["errors"][name] = message["error"]
            else:
                self.ready.append(message["way"])
                result["compile_seconds"][name] = message["seconds"]

    def time(self, way, seconds, result):
        """Seconds for each unit, in blocks."""
        self.process.stdin.write(json.dumps({"way": way, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        message = self._next(60 + 10 * seconds)
        if "times" in message:
            return message["times"]
        last = "no answer in time" if message.get("late") else "ended: " + " | ".join(self.log[-6:])
        result["errors"][f"{self.label}{way}"] = message.get("error", last)
        self.ready = [other for other in self.ready if other != way] if "error" in message else []
        return []

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def serve(build):
    """What a worker's process does: builds, runs each way once, then times what its standard input asks for.

    Args:
        build: function without arguments that returns a dict from a way's name to its function.
    """

    def say(**message):
        print(f"\n{MARK}{json.dumps(message)}", flush=True)

    started = time.perf_counter()
    try:
        ways = build()
    except Exception as error:
        say(way="", error=described(error))
        ways = {}
    for name, way in ways.items():
        try:
            way()
            say(way=name, seconds=time.perf_counter() - started)
        except Exception as error:
            say(way=name, error=described(error))
    say(prepared=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            way, times = ways[order["way"]], []
            way()
            end = time.perf_counter() + order["seconds"]
            while time.perf_counter() < end or len(times) < 3:
                times.append(way())
            say(times=times)
        except Exception as error:
            say(error=described(error))


def described(error):
    text = f"{type(error).__name__}: {error}"
    if any(sign in text for sign in ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")):
        return f"skipped: this size does not fit the memory ({text[:120]})"
    traceback.print_exc()
    return text[:600]
