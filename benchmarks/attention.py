"""Time and peak memory of self-attention against length, as ratios to `keras.layers.MultiHeadAttention`.

    python benchmarks/attention.py --backend tensorflow --output attention.json

Both layers have 8 heads of 64 and the same input. Times are taken in turn, each side in a process of its own; memory is
what one call, forward and backward, adds at its peak to what a fresh process held just before, compiled already. Where
a call of Keras' layer would not fit the memory, its figures are four times those of half the length, and marked with ~.
A ratio above 1 says that this library is faster, or takes less. `--small` runs in seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from side_by_side import MARK, Worker, measure, serve

HEADS, HEAD_DIM = 8, 64
# Batch and lengths. What takes long is timed less often by itself: a turn has 3 blocks at least.
SIZES = {16: (128, 256, 512), 1: (128, 256, 512, 1024, 2048, 4096, 8192, 16384)}
SMALL = {2: (16, 32), 1: (64,)}
DIRECTIONS = ("forward", "both")
COPIES_OF_SCORES = 4.5  # That Keras' layer holds at once, forward and backward.
SIDES = ("ours", "keras")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("KERAS_BACKEND", "tensorflow")
    parser.add_argument(
        "--backend", choices=("tensorflow", "jax", "torch"), default=default, help=f"default: {default}"
    )
    parser.add_argument("--jit", action="store_true", help="compile with XLA on TensorFlow (JAX always does)")
    parser.add_argument("--causal", action="store_true", help="let a position see itself and earlier ones alone")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these lengths (default: 128 to 16,384)")
    parser.add_argument("--time-limit", type=int, default=4096, help="longest length that is timed (default: 4096)")
    parser.add_argument("--seconds", type=float, default=0.5, help="each turn of timing lasts so long (default: 0.5)")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # What a process of its own runs.
    parser.add_argument("--memory-of", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(f"\n{MARK}{json.dumps(peak_memory(arguments))}", flush=True)
    elif arguments.side:
        serve(lambda: ways_of(arguments))
    else:
        compare(arguments)


def cases_of(arguments):
    sizes = SMALL if arguments.small else SIZES
    wanted = arguments.lengths
    return [(batch, n) for batch, lengths in sizes.items() for n in lengths if wanted is None or n in wanted]


def fits(side, batch, length):
    """Whether a call fits what memory is free. Only Keras' layer holds all scores."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return side == "ours" or COPIES_OF_SCORES * 4 * batch * HEADS * length**2 < 0.9 * free


def call_of(side, batch, length, arguments):
    """Functions without arguments that run a layer forward, and forward and backward; and one that compiles both."""
    import keras
    import numpy as np

    import keras_transformer as kt

    keras.utils.set_random_seed(0)
    dim = HEADS * HEAD_DIM
    x = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=(batch, length, dim)).astype("float32"))
    if side == "ours":
        layer = kt.layers.MultiHeadSelfAttention(HEADS, head_dim=HEAD_DIM, causal=arguments.causal)
        layer.build(x.shape)
        attend = layer
    else:
        layer = keras.layers.MultiHeadAttention(HEADS, HEAD_DIM)
        layer.build(x.shape, x.shape)

        def attend(x):
            return layer(x, x, use_causal_mask=arguments.causal)

    return globals()[f"compiled_by_{keras.backend.backend()}"](layer, attend, x, arguments.jit)


def compiled_by_tensorflow(layer, attend, x, jit):
    import tensorflow as tf

    def both():
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(attend(x))
        return tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

    ways = {
        "forward": tf.function(lambda: attend(x), jit_compile=jit),
        "both": tf.function(both, jit_compile=jit),
    }
    for way in ways.values():
        way.get_concrete_function()
    return {
        name: lambda way=way: tf.nest.map_structure(lambda y: y[..., :1].numpy(), way()) for name, way in ways.items()
    }


def compiled_by_jax(layer, attend, x, jit):
    import jax

    def forward(values, x):
        import keras

        with keras.StatelessScope(state_mapping=list(zip(layer.trainable_variables, values, strict=True))):
            return attend(x)

    values = [v.value for v in layer.trainable_variables]
    both = jax.grad(lambda values, x: forward(values, x).sum(), argnums=(0, 1))
    ways = {name: jax.jit(way).lower(values, x).compile() for name, way in (("forward", forward), ("both", both))}
    return {name: lambda way=way: jax.block_until_ready(way(values, x)) for name, way in ways.items()}


def compiled_by_torch(layer, attend, x, jit):
    import torch

    def forward():
        with torch.no_grad():
            return attend(x)

    def both():
        given = x.detach().requires_grad_()
        return torch.autograd.grad(attend(given).sum(), [given, *(v.value for v in layer.trainable_variables)])

    return {"forward": forward, "both": both}


def ways_of(arguments):
    """What a worker's process times."""
    ways = {}
    for batch, length in cases_of(arguments):
        if length <= arguments.time_limit and fits(arguments.side, batch, length):
            for name, call in call_of(arguments.side, batch, length, arguments).items():
                ways[f" {batch} {length} {name}"] = lambda call=call: seconds_of(call)
    return ways


def seconds_of(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_memory(arguments):
    """Bytes that a call, forward and backward, adds at its peak to what the process holds just before."""
    calls = call_of(arguments.side, *arguments.memory_of, arguments)
    Path("/proc/self/clear_refs").write_text("5")  # The peak is counted from here.
    before = held("VmRSS")
    seconds = seconds_of(calls["both"])
    return {"bytes": held("VmHWM") - before, "first_seconds": seconds}


def held(name):
    """Bytes that the kernel reports of this process: `VmRSS` now, `VmHWM` at the peak."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def command_of(side, arguments):
    command = [__file__, "--side", side, "--time-limit", str(arguments.time_limit)]
    command += ["--jit"] * arguments.jit + ["--causal"] * arguments.causal + ["--small"] * arguments.small
    return command + (["--lengths", *map(str, arguments.lengths)] if arguments.lengths else [])


def compare(arguments):
    environment = {"KERAS_BACKEND": arguments.backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    workers = [Worker(side, command_of(side, arguments), environment) for side in SIDES]
    timed = measure(workers, arguments.seconds, arguments.repeat, 300)
    for name, error in timed["errors"].items():
        print(f"{name} FAILED: {error}", flush=True)
    rows = {}
    for batch, length in cases_of(arguments):
        row = rows[f"{batch} {length}"] = {}
        for direction in DIRECTIONS:
            row[direction] = {side: timed["ways"].get(f"{side} {batch} {length} {direction}") for side in SIDES}
        if not arguments.no_memory:
            row["memory"] = {side: memory_of(side, batch, length, arguments, environment) for side in SIDES}
        for quantity, unit in (("forward", "seconds"), ("both", "seconds"), ("memory", "bytes")):
            extrapolate(row.get(quantity, {}), rows.get(f"{batch} {length // 2}", {}).get(quantity), unit)
        print(line_of(batch, length, row), flush=True)
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"settings": vars(arguments), "rows": rows}, indent=2, default=str) + "\n"
        )


def memory_of(side, batch, length, arguments, environment):
    if not fits(side, batch, length):
        return None
    command = [sys.executable, *command_of(side, arguments), "--memory-of", str(batch), str(length)]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    lines = [line for line in found.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        print(f"{side}, batch {batch}, length {length} FAILED: {found.stderr[-300:]}", flush=True)
    return json.loads(lines[0].removeprefix(MARK)) if lines else None


def extrapolate(quantity, of_half, unit):
    """Puts in for Keras' layer what it would take by four times that of half the length."""
    if quantity.get("ours") and not quantity.get("keras") and of_half and of_half.get("keras"):
        quantity["keras"] = {unit: 4 * of_half["keras"][unit], "extrapolated": True}


def line_of(batch, length, row):
    line = f"batch {batch:3} length {length:6}"
    for quantity, unit, scale, name in (
        ("forward", "seconds", 1e3, "ms"), ("both", "seconds", 1e3, "ms"), ("memory", "bytes", 2**-20, "MiB")
    ):  # fmt: skip
        found = row.get(quantity, {})
        if not all(found.get(side) for side in SIDES):
            continue
        ours, keras = (scale * found[side][unit] for side in SIDES)
        about = "~" if found["keras"].get("extrapolated") else ""
        found["ratio"] = keras / max(ours, 1e-9)
        line += f" | {quantity} {ours:.1f} against {about}{keras:.1f} {name}: {about}{found['ratio']:.2f}"
        spread = [found[side]["quartiles"] for side in SIDES if "quartiles" in found[side]]
        line += "".join(f" ({scale * low:.1f} to {scale * high:.1f})" for low, high in spread)
    return line


if __name__ == "__main__":
    main()
