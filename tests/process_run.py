"""One of several processes that train a tiny language model together, and go on until they are killed.

KERAS_BACKEND=jax python tests/process_run.py 0 127.0.0.1:12355 127.0.0.1:12356 &
KERAS_BACKEND=jax python tests/process_run.py 1 127.0.0.1:12355 127.0.0.1:12356

The first one prints, as JSON, what came out beside what one process finds on one device.
"""

import json
import os
import sys
import traceback

import keras
import numpy as np
import tensorflow as tf

import keras_transformer as kt

rng = np.random.default_rng(0)
TOKENS = rng.integers(3, 32, (15, 9)).astype("int32")  # Fifteen rows, which two processes cannot share evenly.
TOKENS[np.arange(9) >= rng.integers(3, 10, (15, 1))] = 0


def results(model, batches):
    return model.fit(batches, epochs=10, verbose=0).history


def tokens(model):
    return kt.generation.Generator(model).generate({"token_ids": TOKENS[:, :3]}, 4).tolist()


def main():
    engine = kt.distribution.start(sys.argv[2:], int(sys.argv[1]))
    keras.utils.set_random_seed(0)
    model = kt.models.causal_lm(32, dim=16, depth=1, num_heads=2, hidden_dim=32, dropout=0.0)
    metrics = [kt.training.TokenAccuracy()]
    model.compile(keras.optimizers.Adam(5e-3), kt.training.SmoothedCrossEntropy(0.1), metrics=metrics)
    batches = tf.data.Dataset.from_tensors(({"token_ids": TOKENS[:, :-1]}, TOKENS[:, 1:]))
    copies = engine.copy(model)
    if engine.rank == 0:
        expected = results(model, batches)
    with engine.scope():
        found = results(copies, engine.rows(batches))
    if keras.backend.backend() == "jax":
        found["tokens"] = tokens(copies)
    if engine.rank == 0:
        if "tokens" in found:
            expected["tokens"] = tokens(model)
        expected_weights = model.get_weights()
    engine.take_back(copies, model)
    if engine.rank == 0:
        apart = max(np.abs(a - b).max() for a, b in zip(expected_weights, model.get_weights(), strict=True) if a.size)
        steps = int(model.optimizer.iterations)
        print(json.dumps({"found": found, "expected": expected, "apart": float(apart), "steps": steps}), flush=True)
    with engine.scope():
        copies.fit(engine.rows(batches), epochs=10**6, verbose=0)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
