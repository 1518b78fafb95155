"""Generation on a CPU, as ratios to other libraries that generate with the same weights in the same run.

    python benchmarks/generate.py --cases "greedy 1" "greedy 16" --output generate.json

A random checkpoint in the Hugging Face layout is written first, a GPT-2 for `greedy`, `sampling` and `beam`, a BART
for `translate`; every side reads it, and `ours-int8` quantizes it by `model.quantize("int8")`. No token ends a row,
so that all do the same work. For each case every side builds and compiles in a process of its own; then they are
timed in turn, again and again, each alone. A ratio is the time of the peer over that of this library: above 1 this
library is faster. Its range is that between opposite quartiles. `same` is the share of tokens that are those of
transformers, which greedy and beam search must agree on. At batch 1 each token has to read all weights once: the
limit is how often the memory can do that. The processes of this library keep the memory that a call frees;
`--keep-memory all` has its peers do so, too, and `--keep-memory none` nobody. `--small` runs everything at toy sizes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from side_by_side import Worker, add_keep_memory, keep_memory, kept_by_all, measure, serve

SIZES = {"dim": 512, "depth": 6, "heads": 8, "vocabulary": 8000, "prompt": 32, "tokens": 64}
SMALL = {"dim": 64, "depth": 2, "heads": 4, "vocabulary": 512, "prompt": 32, "tokens": 8}
CASES = [f"{kind} {batch}" for kind, batches in (
    ("greedy", (1, 16, 64)), ("sampling", (1, 16, 64)), ("beam", (1, 16)), ("translate", (16,))
) for batch in batches]  # fmt: skip
PEERS = ("ours-int8", "ctranslate2", "ctranslate2-int8", "transformers", "keras-hub")
WIDTH, TOP_K = 4, 40


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="default: all")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help="default: all")
    parser.add_argument("--backend", default=os.environ.get("KERAS_BACKEND", "tensorflow"), help="of this library")
    add_keep_memory(parser)
    parser.add_argument("--seconds", type=float, default=2.0, help="each turn of timing lasts so long (default: 2)")
    parser.add_argument("--repeat", type=int, default=2, help="turns of each (default: 2)")
    parser.add_argument("--patience", type=float, default=120, help="seconds that compiling may take (default: 120)")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--output", type=Path, help="JSON file; the cases that it has already are kept")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # What a worker process runs, and where the checkpoint is.
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else SIZES
    if arguments.side:
        work(arguments, sizes)
        return
    found = json.loads(arguments.output.read_text()) if arguments.output and arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        command = [__file__, "--side", "checkpoints", "--directory", directory, *["--small"] * arguments.small]
        if subprocess.run([sys.executable, *command]).returncode:
            sys.exit(1)
        for case in arguments.cases:
            found[case] = result = measure_case(case, arguments, sizes, Path(directory))
            report(case, result, sizes)
            if arguments.output:
                arguments.output.write_text(json.dumps(found, indent=2) + "\n")


def work(arguments, sizes):
    """What a process other than the first does."""
    import generate_sides

    if arguments.side == "checkpoints":
        try:
            generate_sides.write_checkpoints(arguments.directory, sizes)
        except ImportError as error:
            sys.exit(str(error))
        return
    keep_memory(arguments)
    (case,) = arguments.cases
    kind, batch = case.split()
    serve(lambda: generate_sides.ways_of(arguments.side, kind, int(batch), sizes, arguments.directory))


def measure_case(case, arguments, sizes, directory):
    sides = ["ours"] + [peer for peer in arguments.peers if case != "translate 16" or peer != "keras-hub"]
    sides += ["memory"] * (case.split()[1] == "1")
    backends = {"ours": arguments.backend, "ours-int8": arguments.backend, "keras-hub": "tensorflow"}
    workers = []
    options = ["--keep-memory", arguments.keep_memory] + ["--small"] * arguments.small
    for side in sides:
        command = [__file__, "--side", side, "--cases", case, "--directory", str(directory), *options]
        environment = {"KERAS_BACKEND": backends.get(side, "torch"), "TF_CPP_MIN_LOG_LEVEL": "3"}
        workers.append(Worker(side, command, environment | kept_by_all(arguments)))
    result = {
        "backend": arguments.backend,
        "keep_memory": arguments.keep_memory,
        **measure(workers, arguments.seconds, arguments.repeat, arguments.patience),
    }
    tokens = {side: path for side in sides if (path := directory / f"{side} {case}.npy").exists()}
    tokens = {side: np.load(path) for side, path in tokens.items()}
    if "transformers" in tokens and not case.startswith("sampling"):
        result["same"] = {side: float((x == tokens["transformers"]).mean()) for side, x in tokens.items()}
    return result


def report(case, result, sizes):
    """Prints a line for each side, those of this library with their ratios to the others, and keeps both."""
    ways, count = result["ways"], int(case.split()[1]) * sizes["tokens"]
    memory = ways.pop("memory", None)
    if memory is not None:
        result["limit"] = 1 / memory["seconds"]
        print(f"{case:14}{'limit of memory':18}{result['limit']:8.0f} tokens/s in float32", flush=True)
    for name, way in ways.items():
        rate = way["tokens_per_second"] = count / way["seconds"]
        low, high = (count / x for x in reversed(way["quartiles"]))
        line = f"{case:14}{name:18}{rate:8.0f} tokens/s ({low:.0f} to {high:.0f})"
        line += f", same {100 * result['same'][name]:.0f}%" if name in result.get("same", {}) else ""
        if name.startswith("ours"):
            way["ratios"] = {peer: ratio(other, way) for peer, other in ways.items() if peer != name}
            parts = (f"{x:.2f} ({low:.2f} to {high:.2f}) x {peer}" for peer, (low, x, high) in way["ratios"].items())
            line = ", ".join([line, *parts])
        print(f"{line}, first call {result['compile_seconds'][name]:.0f} s", flush=True)
    for name, error in result["errors"].items():
        print(f"{case:14}{name:18} FAILED: {error}", flush=True)


def ratio(peer, ours):
    """How much longer the peer takes: its first quartile over our third, the medians, and the other way around."""
    (low, high), (least, most) = peer["quartiles"], ours["quartiles"]
    return low / most, peer["seconds"] / ours["seconds"], high / least


if __name__ == "__main__":
    main()
