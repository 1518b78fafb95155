"""Training on a CPU in float32, as ratios to KerasHub and torch timed in the same run.

    python benchmarks/train.py --cases encoder --dropouts 0 0.1 --output train.json

For each case one process of this library, one of KerasHub and one of torch build and compile side by side; then they
are timed in turn, again and again, each alone. A step is one of `Model.fit` with AdamW, from the end of the step before
to its own (on torch, of a loop by hand). This library and KerasHub run with and without XLA, torch with and without
`torch.compile`, and the better way of each counts. Dropout is in the same places everywhere: on attention weights and
on what the attention and the feed-forward network add (in the vision transformer inside the latter as well). The
process of this library keeps the memory that a step frees, as the examples do; `--keep-memory all` has its peers do so,
too, and `--keep-memory none` nobody.

A ratio above 1 says that this library is faster. Times are medians of steps with first and third quartile; the
quartiles of a ratio are those of the turns, each side's median to the other's. The share of a step is the arithmetic
that it must do over its time (`flops.py`), as a part of the highest rate measured for a product of two large matrices
in the same process. `--small` runs everything at toy sizes.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import flops
from side_by_side import Worker, add_keep_memory, keep_memory, kept_by_all, measure, serve

SIZES = {
    "encoder": {"batch": 16, "length": 128, "dim": 256, "depth": 4, "heads": 8, "hidden": 1024, "classes": 10},
    "encoder_decoder": {"batch": 32, "length": 64, "dim": 256, "depth": 2, "heads": 8, "hidden": 1024,
                        "vocabulary": 8000},
    "vit": {"batch": 32, "image": 64, "patch": 8, "dim": 256, "depth": 4, "heads": 8, "hidden": 1024, "classes": 10},
    "causal_lm": {"batch": 16, "length": 128, "dim": 256, "depth": 4, "heads": 8, "hidden": 1024, "vocabulary": 8000},
}  # fmt: skip
SMALL = {
    "encoder": {"batch": 2, "length": 16, "dim": 32, "depth": 2, "heads": 2, "hidden": 64, "classes": 10},
    "encoder_decoder": {"batch": 2, "length": 8, "dim": 32, "depth": 1, "heads": 2, "hidden": 64, "vocabulary": 100},
    "vit": {"batch": 2, "image": 16, "patch": 8, "dim": 32, "depth": 2, "heads": 2, "hidden": 64, "classes": 10},
    "causal_lm": {"batch": 2, "length": 16, "dim": 32, "depth": 2, "heads": 2, "hidden": 64, "vocabulary": 100},
}  # fmt: skip
FLOPS = {
    "encoder": flops.encoder,
    "encoder_decoder": flops.encoder_decoder,
    "vit": flops.vision_transformer,
    "causal_lm": flops.causal_lm,
}
MATRICES = {False: (1024, 2048), True: (64, 128)}  # Sizes of the products, whether small or not.


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    backends = ("tensorflow", "jax", "torch")
    default = os.environ.get("KERAS_BACKEND", "tensorflow")
    parser.add_argument("--backend", choices=backends, default=default, help="of this library and KerasHub")
    parser.add_argument("--cases", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.1], help="rates of dropout (default: 0.1)")
    parser.add_argument("--sides", nargs="+", choices=("ours", "keras_hub", "torch"),
                        default=["ours", "keras_hub", "torch"], help="default: all")  # fmt: skip
    add_keep_memory(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="each turn of timing lasts so long (default: 1)")
    parser.add_argument("--repeat", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--patience", type=float, default=300, help="seconds that compiling may take (default: 300)")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--output", type=Path, help="JSON file, written anew after each case")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # What a worker's process runs.
    arguments = parser.parse_args()
    if arguments.side:
        serve(lambda: ways_of(arguments))
        return
    results = {}
    for case in arguments.cases:
        for dropout in arguments.dropouts:
            started, name = time.perf_counter(), f"{case}, dropout {dropout:g}"
            results[name] = measure_case(case, dropout, arguments)
            report(name, results[name])
            print(f"{time.perf_counter() - started:.0f} seconds\n", flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def measure_case(case, dropout, arguments):
    sizes = (SMALL if arguments.small else SIZES)[case]
    command = [__file__, "--cases", case, "--dropouts", str(dropout), "--backend", arguments.backend]
    command += ["--keep-memory", arguments.keep_memory] + ["--small"] * arguments.small
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": arguments.backend} | kept_by_all(arguments)
    workers = [Worker(side, [*command, "--side", side], environment) for side in arguments.sides]
    result = measure(workers, arguments.seconds, arguments.repeat, arguments.patience)
    rates = {
        name: flops.matmul({"size": int(name.split()[-1])}) / way["seconds"]
        for name, way in result["ways"].items()
        if " matmul " in name
    }
    return {"sizes": sizes, "dropout": dropout, "backend": arguments.backend, "keep_memory": arguments.keep_memory,
            "flops": FLOPS[case](sizes), "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS"), "matrix_rates": rates,
            **result}  # fmt: skip


def ways_of(arguments):
    """What a worker's process times."""
    if arguments.side == "torch":
        import train_torch as side
    else:
        import train_keras as side
    keep_memory(arguments)
    (case,), (dropout,) = arguments.cases, arguments.dropouts
    sizes = {**(SMALL if arguments.small else SIZES)[case], "dropout": dropout}
    ways = side.training(case, sizes, arguments.side)
    return ways | {f" matmul {size}": side.matmul(size) for size in MATRICES[arguments.small]}


def report(name, result):
    """Prints a line for each way to train, and one for the better ways of each side."""
    ways = {way: found for way, found in result["ways"].items() if " matmul " not in way}
    print(f"{name}, {result['backend']}")
    for way, found in ways.items():
        low, high = (1000 * x for x in found["quartiles"])
        print(f"  {way:24}{1000 * found['seconds']:8.1f} ms ({low:.1f} to {high:.1f})")
    best = {}
    for way, found in ways.items():
        side = way.split()[0]
        if side not in best or found["seconds"] < ways[best[side]]["seconds"]:
            best[side] = way
    if "ours" in best:
        ours = ways[best["ours"]]
        result["ratios"] = {}
        for side in sorted(set(best) - {"ours"}):
            pairs = zip(ways[best[side]]["turns"], ours["turns"], strict=False)
            turns = [theirs / own for theirs, own in pairs]
            quartiles = statistics.quantiles(turns, n=4) if len(turns) > 1 else 3 * turns
            ratio = ways[best[side]]["seconds"] / ours["seconds"]
            result["ratios"][side] = {"ratio": ratio, "quartiles": [quartiles[0], quartiles[2]]}
            print(f"  {ratio:.2f} x {side} ({quartiles[0]:.2f} to {quartiles[2]:.2f}): {best['ours']}, {best[side]}")
        for side in ("ours", "torch"):
            rate = max((rate for way, rate in result["matrix_rates"].items() if way.startswith(side)), default=None)
            if rate:
                share = result[f"share_of_{side}_matrix_rate"] = result["flops"] / ours["seconds"] / rate
                print(f"  {100 * share:.1f}% of the matrix rate of the process of {side}, {rate / 1e9:.0f} GFLOP/s")
    if result["compile_seconds"]:
        parts = ", ".join(f"{way} {seconds:.0f} s" for way, seconds in result["compile_seconds"].items())
        print(f"  prepared after: {parts}")
    for way, error in result["errors"].items():
        print(f"  {way}: {error}")


if __name__ == "__main__":
    main()
