"""What one waits for at first: importing the library, building a small model, its first prediction, its first step.

    python benchmarks/startup.py --output startup.json

Each run is a process of its own, and those of the sides take turns: this library and KerasHub. Importing a library is
timed after `import keras` in the same process, which says what comes on top of that. The model is the causal language
model of `train.py` at its toy size, compiled as `Model.compile` does by default. A garbage collection of all that was
imported takes a fifth of a second, and falls into one part or another by chance: `--no-collections` goes without.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIDES = ("ours", "keras_hub")
PARTS = ("keras", "import", "build", "predict", "step")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="of each side (default: 7)")
    parser.add_argument("--small", action="store_true", help="2 runs of each side")
    parser.add_argument("--no-collections", action="store_true", help="keep Python from collecting garbage")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.no_collections:
            gc.disable()
        print(json.dumps(first_times(arguments.side)))
        return
    runs = {side: [] for side in SIDES}
    for turn in range(1 + (2 if arguments.small else arguments.runs)):
        for side in SIDES:
            found = run(side, ["--no-collections"] * arguments.no_collections)
            if turn:  # The first one reads the files from the disk.
                runs[side].append(found)
    table = {side: {part: quartiles([run[part] for run in found]) for part in found[0]} for side, found in runs.items()}
    report(table)
    if arguments.output:
        arguments.output.write_text(json.dumps({"seconds": table, "runs": runs}, indent=2) + "\n")


def run(side, options):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, "--side", side, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def first_times(side):
    """Seconds that each part takes in this process."""
    started = time.perf_counter()
    import keras  # noqa: F401

    seconds = {"keras": time.perf_counter() - started}
    started = time.perf_counter()
    if side == "ours":
        import keras_transformer  # noqa: F401
    else:
        try:
            import keras_hub  # noqa: F401
        except ImportError as error:
            raise ImportError("This side needs keras-hub: `pip install keras-transformer-layers[bench]`.") from error
    seconds["import"] = time.perf_counter() - started
    import train
    import train_keras

    sizes = {**train.SMALL["causal_lm"], "dropout": 0.1}
    ids, labels = train_keras.data_of("causal_lm", sizes)
    started = time.perf_counter()
    library = train_keras.ours(sizes) if side == "ours" else train_keras.keras_hub(sizes)
    model = train_keras.causal_lm(sizes, library)
    model.compile("adam", train_keras.loss_of("causal_lm", side))
    for part, act in (("build", None), ("predict", model.predict_on_batch), ("step", model.train_on_batch)):
        if act is not None:
            act(*(ids, labels)[: 1 if part == "predict" else 2])
        seconds[part] = time.perf_counter() - started
        started = time.perf_counter()
    return seconds


def quartiles(numbers):
    low, middle, high = statistics.quantiles(numbers, n=4)
    return {"median": middle, "quartiles": [low, high]}


def report(table):
    for part in PARTS:
        for side in SIDES:
            found = table[side][part]
            low, high = found["quartiles"]
            print(f"{part:8} {side:10} {found['median']:6.3f} s ({low:.3f} to {high:.3f})")
        if part != "keras":
            print(f"{part:8} {table['keras_hub'][part]['median'] / table['ours'][part]['median']:.2f} x keras_hub")


if __name__ == "__main__":
    main()
