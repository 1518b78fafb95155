"""What devices must tell each other in a training step, by the compiled program, and what each of them holds.

    python benchmarks/collectives.py

A small language model is split over eight virtual devices of this machine under JAX, in several ways. Of each, the
program's collective operations are counted and the bytes that a device takes part in with them, beside what the
formulas of docs/distribution.md say. Nothing is timed: virtual devices share the processor.
"""

import argparse
import json
import math
import os
import re

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_transformer as kt  # noqa: E402

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s64": 8, "f64": 8, "u8": 1, "s8": 1}


def collectives(program):
    """Dict from kind to `[count, bytes]` of the results of a program's collective operations."""
    found, program = {}, re.sub(r"/\*.*?\*/", "", program)
    for result, kind in re.findall(rf"= (\(?[^=]*?) ({KINDS})(?:-start)?\(", program):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        size = sum(SIZES[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in shapes)
        count, total = found.get(kind, [0, 0])
        found[kind] = [count + len(shapes), total + size]
    return found


def compiled_step(base, shape, batch, length):
    """The text of the training step split over a mesh, and the bytes on each device of weights and of the optimizer."""
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), keras.distribution.list_devices())
    parallel = keras.distribution.ModelParallel(
        layout_map=kt.distribution.layout_map(base, mesh), batch_dim_name="batch"
    )
    with parallel.scope():
        model = keras.models.clone_model(base)
        model.compile("adam", kt.training.SmoothedCrossEntropy(0.0))
        ids = np.random.default_rng(0).integers(1, 256, (batch, length)).astype("int32")
        model._symbolic_build(data_batch=(ids, ids))
        kinds = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
        state = model._get_jax_state(**dict.fromkeys(kinds, True))
        place = jax.sharding.NamedSharding(mesh.backend_mesh, jax.sharding.PartitionSpec("batch"))
        data = tuple(jax.device_put(ids, place) for _ in range(2))
        program = jax.jit(model.train_step).lower(state, data).compile().as_text()
        return program, *(size_of_parts(x.variables) for x in (model, model.optimizer))


def size_of_parts(variables):
    """Bytes of float32 that each device holds of variables."""
    return sum(4 * math.prod(v.value.sharding.shard_shape(v.value.shape)) for v in variables if "float" in v.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 64), ("depth", 4), ("batch", 16), ("length", 32)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--output", help="file to write the result to, as JSON")
    arguments = parser.parse_args()
    dim, depth = arguments.dim, arguments.depth
    base = kt.models.causal_lm(256, dim=dim, depth=depth, num_heads=8, hidden_dim=4 * dim, dropout=0.0)
    results = {}
    for data, model in ((8, 1), (4, 2), (2, 4), (1, 8)):
        program, weights, optimizer = compiled_step(base, (data, model), arguments.batch, arguments.length)
        activations = 4 * arguments.batch // data * arguments.length * dim
        # The embedding is its own output projection, and each use of it has a gradient.
        expected = weights + 4 * 256 * dim // model if data > 1 else 0
        expected += (6 * depth + 2) * activations if model > 1 else 0
        found = collectives(program)
        moved = sum(size for _, size in found.values())
        held = {"weights": weights, "optimizer": optimizer}
        results[f"{data} x {model}"] = {"collectives": found, "bytes": moved, "formula": expected, "held": held}
        print(f"data {data} x model {model}: {found}, {moved:,} bytes, {expected:,} by the formula; held: {held}")
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
