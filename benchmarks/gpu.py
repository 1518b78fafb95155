"""Training and generation on one large GPU in bfloat16, as ratios to torch libraries timed in the same run.

    python benchmarks/gpu.py --backends jax torch --output gpu.json

For each case one process for each backend of this library and one for each peer build and compile side by side; then
they are timed in turn, again and again, each alone. Times are medians of blocks of steps with their first and third
quartile. A ratio above 1 says that this library is faster than the peer. The share of a training step is the
arithmetic it must do over its time, as a part of the rate measured for a product of two large bfloat16 matrices:
six operations for each weight of a matrix and token, output projection included, and those of attention, of which a
causal one counts half. `--small` runs everything at toy sizes, on a CPU as well.
"""

import argparse
import json
import os
import time
from pathlib import Path

import flops
from side_by_side import Worker, measure, serve

SIZES = {
    "matmul": {"size": 8192},
    "gpt2": {"batch": 16, "length": 1024, "dim": 768, "depth": 12, "heads": 12, "vocabulary": 50304},
    "vit": {"batch": 128, "image": 224, "patch": 16, "dim": 768, "depth": 12, "heads": 12, "classes": 1000},
    "translation": {"batch": 128, "length": 128, "dim": 512, "depth": 6, "heads": 8, "hidden": 2048,
                    "vocabulary": 32000},
    "generate": {"batches": [1, 64, 512], "prompt": 32, "tokens": 64, "dim": 768, "depth": 12, "heads": 12,
                 "vocabulary": 50304, "length": 1024},
}  # fmt: skip
SMALL = {
    "matmul": {"size": 256},
    "gpt2": {"batch": 2, "length": 64, "dim": 64, "depth": 2, "heads": 4, "vocabulary": 512},
    "vit": {"batch": 2, "image": 32, "patch": 16, "dim": 64, "depth": 2, "heads": 4, "classes": 10},
    "translation": {"batch": 2, "length": 16, "dim": 64, "depth": 2, "heads": 4, "hidden": 128, "vocabulary": 512},
    "generate": {"batches": [1, 4], "prompt": 32, "tokens": 4, "dim": 64, "depth": 2, "heads": 4, "vocabulary": 512,
                 "length": 128},
}  # fmt: skip
PEERS = {
    "matmul": ["torch"],
    "gpt2": ["transformers"],
    "vit": ["timm"],
    "translation": ["torch"],
    "generate": ["transformers", "transformers-static"],
}
STEPS = 10  # Training steps in a block.
FLOPS = {
    "matmul": flops.matmul,
    "gpt2": flops.causal_lm,
    "vit": flops.vision_transformer,
    "translation": flops.encoder_decoder,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [os.environ.get("KERAS_BACKEND", "jax")]
    choices = ("jax", "torch", "torch-compiled")
    parser.add_argument(
        "--backends", nargs="+", choices=choices, default=default, help="default: KERAS_BACKEND, or jax"
    )
    parser.add_argument("--cases", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="each turn of timing lasts so long (default: 2)")
    parser.add_argument("--repeat", type=int, default=2, help="turns of each (default: 2)")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which no case begins (default: 600)")
    parser.add_argument("--patience", type=float, default=150, help="seconds that compiling may take (default: 150)")
    parser.add_argument("--batch", type=int, help="batch of the training cases (default: that of each)")
    parser.add_argument("--packed", action="store_true", help="train our language model with no mask, as its peer")
    parser.add_argument("--no-peers", action="store_true", help="time this library alone")
    parser.add_argument("--small", action="store_true", help="toy sizes, which a CPU can run")
    parser.add_argument("--output", type=Path, help="JSON file, written anew after each case")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # What a worker process runs, and on which case.
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer or arguments.ours:
        serve(lambda: ways_of(arguments))
        return
    started, results, rate = time.perf_counter(), {}, None
    for case in arguments.cases:
        if time.perf_counter() - started > arguments.limit:
            print(f"{case}: left out, as more than {arguments.limit:g} seconds have passed", flush=True)
            continue
        results[case] = measure_case(case, arguments)
        if case == "matmul" and results[case]["ways"]:
            seconds = min(way["seconds"] for way in results[case]["ways"].values())
            rate = FLOPS[case](sizes_of(case, arguments)) / seconds
        report(case, results[case], rate)
        if arguments.output:
            arguments.output.write_text(json.dumps({"matrix_rate": rate, "cases": results}, indent=2) + "\n")
    print(f"{time.perf_counter() - started:.0f} seconds in all", flush=True)


def sizes_of(case, arguments):
    sizes = dict((SMALL if arguments.small else SIZES)[case])
    if arguments.batch and "batch" in sizes:
        sizes["batch"] = arguments.batch
    return sizes


def measure_case(case, arguments):
    """Times a case in all its processes; returns a dict of results and errors."""
    sizes = sizes_of(case, arguments)
    workers = [worker("ours", backend, case, arguments) for backend in arguments.backends]
    if not arguments.no_peers:
        workers += [worker("peer", peer, case, arguments) for peer in PEERS[case]]
    result = {"sizes": sizes, **measure(workers, arguments.seconds, arguments.repeat, arguments.patience)}
    if case in FLOPS:
        result["flops"] = FLOPS[case](sizes)
    return result


def worker(kind, name, case, arguments):
    command = [__file__, f"--{kind}", name, "--cases", case]
    command += ["--small"] * arguments.small + ["--packed"] * arguments.packed
    command += ["--batch", str(arguments.batch)] if arguments.batch else []
    environment = {
        "KERAS_BACKEND": name.split("-")[0] if kind == "ours" else "torch",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return Worker(f"{kind} {name}", command, environment)


def ways_of(arguments):
    """What a worker's process times."""
    (case,) = arguments.cases
    if arguments.peer:
        import gpu_peers as side
    else:
        import gpu_ours as side
    sizes = {**sizes_of(case, arguments), "packed": arguments.packed}
    return side.WAYS[case](sizes, arguments.peer or arguments.ours)


def report(case, result, rate):
    """Prints a line for each way of a case, those of this library with their ratios to each peer."""
    ways = result["ways"]
    for name, way in ways.items():
        low, high = (1000 * x for x in way["quartiles"])
        line = f"{case:12}{name:38}{1000 * way['seconds']:10.3f} ms ({low:.3f} to {high:.3f})"
        if case == "generate":
            batch = int(name.split(" batch ")[1])
            way["tokens_per_second"] = batch * result["sizes"]["tokens"] / way["seconds"]
            line += f" {way['tokens_per_second']:11.0f} tokens/s"
        elif case == "matmul" or rate:
            way["flops_per_second"] = result["flops"] / way["seconds"]
            line += f" {way['flops_per_second'] / 1e12:8.1f} TFLOP/s"
            if rate and case != "matmul":
                way["share_of_matrix_rate"] = way["flops_per_second"] / rate
                line += f", {100 * way['share_of_matrix_rate']:.1f}% of the matrix rate"
        if name.startswith("ours") and case != "matmul":
            batch = name[name.index(" batch ") :] if " batch " in name else ""
            peers = {peer: x["seconds"] for peer, x in ways.items() if peer.startswith("peer") and peer.endswith(batch)}
            way["ratios"] = {peer: seconds / way["seconds"] for peer, seconds in peers.items()}
            line += "".join(f", {ratio:.2f} x {peer}" for peer, ratio in way["ratios"].items())
        print(line, flush=True)
    for name, error in result["errors"].items():
        print(f"{case:12}{name:38} FAILED: {error}", flush=True)
    if result["compile_seconds"]:
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["compile_seconds"].items())
        print(f"{case:12}prepared: {parts}", flush=True)


if __name__ == "__main__":
    main()
