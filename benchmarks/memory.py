"""Peak memory and time of a training step with and without `remat`, on the backend that `KERAS_BACKEND` names.

    KERAS_BACKEND=jax python benchmarks/memory.py
    KERAS_BACKEND=jax python benchmarks/memory.py --timed

A language model of 12 blocks takes steps of `train_on_batch` with Adam, each way in a process of its own. The memory is
that of weights and optimizer, which is kept, and of what passes in a step, at its peak: on JAX by XLA's analysis of the
compiled step, on TensorFlow by its allocator, on torch by the resident set of the process. `process` is the largest
resident set in all, graphs that were traced and compiled included, less what was resident before the model was made.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = {"dim": 128, "depth": 12, "num_heads": 4, "dropout": 0.1}
VOCABULARY = 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="texts in a batch (default: 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a text (default: 256)")
    parser.add_argument("--steps", type=int, default=3, help="steps after the first, timed or not (default: 3)")
    parser.add_argument("--jit-compile", action="store_true", help="on TensorFlow, compile by XLA")
    parser.add_argument("--timed", action="store_true", help="take steps on JAX, too, and show times")
    parser.add_argument("--remat", choices=("no", "yes"), help=argparse.SUPPRESS)  # What a process measures.
    arguments = parser.parse_args()
    if arguments.remat:
        print(json.dumps(measure(arguments)))
        return
    found = {}
    for remat in ("no", "yes"):
        command = [sys.executable, *sys.argv, "--remat", remat]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[remat] = json.loads(result.stdout.splitlines()[-1])
        numbers = found[remat]["megabytes"].items()
        seconds = found[remat]["seconds"]
        print(f"remat {remat:4}", *(f"{name} {number:.0f} MB" for name, number in numbers), sep="  ", end="")
        print(f"  {1000 * seconds:.0f} ms a step" if arguments.timed else "", flush=True)
    parts = [f"{found['yes']['megabytes']['peak'] / found['no']['megabytes']['peak']:.2f} of the memory"]
    if arguments.timed:
        parts.append(f"{found['yes']['seconds'] / found['no']['seconds']:.2f} of the time")
    print(", ".join(parts))


def measure(arguments):
    import keras
    import numpy as np

    import keras_transformer as kt

    backend = keras.backend.backend()
    keras.utils.set_random_seed(0)
    shape = (arguments.batch, arguments.length)
    inputs, labels = np.random.default_rng(0).integers(1, VOCABULARY, (2, *shape)).astype("int32")
    before = resident("VmRSS")
    model = kt.models.causal_lm(VOCABULARY, **SIZES, remat=arguments.remat == "yes")
    compiled = {"jit_compile": arguments.jit_compile} if backend == "tensorflow" else {}
    model.compile(keras.optimizers.Adam(1e-4), kt.training.SmoothedCrossEntropy(0.0), **compiled)
    megabytes = compiled_memory(model, inputs, labels) if backend == "jax" else {}
    seconds = []
    if backend != "jax" or arguments.timed:
        for _ in range(1 + arguments.steps):
            begin = time.perf_counter()
            model.train_on_batch(inputs, labels)
            seconds.append(time.perf_counter() - begin)
    if backend != "jax":
        whole = resident("VmHWM") - before
        kept = sum(4 * np.prod(x.shape) for x in (*model.variables, *model.optimizer.variables)) / 1e6
        passing = (passing_of_tensorflow if backend == "tensorflow" else passing_of_torch)(model, inputs, labels)
        megabytes = {"kept": kept, "passing": passing, "peak": kept + passing, "process": whole}
    return {"megabytes": megabytes, "seconds": statistics.median(seconds[1:]) if seconds else None}


def passing_of_tensorflow(model, inputs, labels):
    """What a step's tensors take at most, in MB; the allocator leaves those of less than 256 KB out."""
    import tensorflow as tf

    tf.config.experimental.reset_memory_stats("CPU:0")
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    model.train_on_batch(inputs, labels)
    return (tf.config.experimental.get_memory_info("CPU:0")["peak"] - before) / 1e6


def passing_of_torch(model, inputs, labels):
    """How far a step raises the resident set, in MB."""
    model.zero_grad()  # Or else the gradients of the step before would make room for those of this one.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # What is free goes back to the system, or the step would take it without a trace.
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak.
    model.train_on_batch(inputs, labels)
    return resident("VmHWM") - before


def compiled_memory(model, inputs, labels):
    """What XLA's analysis says of the training step, in MB."""
    import jax

    model._symbolic_build(data_batch=(inputs, labels))
    kinds = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
    state = model._get_jax_state(**dict.fromkeys(kinds, True))
    # The new state takes the place of the old one, as in `fit`.
    step = jax.jit(model.train_step, donate_argnums=0).lower(state, (inputs, labels)).compile()
    sizes = step.memory_analysis()
    kept, passing = sizes.argument_size_in_bytes / 1e6, sizes.temp_size_in_bytes / 1e6
    return {"kept": kept, "passing": passing, "peak": kept + passing}


def resident(which):
    """Megabytes of this process in memory: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024 / 1e6


if __name__ == "__main__":
    main()
