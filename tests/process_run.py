"""Two processes that train a tiny language model together, and go on until one of them is killed.

KERAS_BACKEND=jax python tests/process_run.py folder 127.0.0.1:12355 127.0.0.1:12356

Prints three things as JSON. First, what came out beside what one process finds on one device, and how far a training
that was stopped and resumed from a backup in the folder ended from one that was not; null if the first process failed.
Then the status with which the first process ended after the second one had been killed, null if one of them had ended
before, and after how many seconds.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_transformer as kt

rng = np.random.default_rng(0)
TOKENS = rng.integers(3, 32, (15, 9)).astype("int32")  # Fifteen rows, which two processes cannot share evenly.
TOKENS[np.arange(9) >= rng.integers(3, 10, (15, 1))] = 0


def build(dropout):
    keras.utils.set_random_seed(0)
    model = kt.models.causal_lm(32, dim=16, depth=1, num_heads=2, hidden_dim=32, dropout=dropout)
    metrics = [kt.training.TokenAccuracy()]
    model.compile(keras.optimizers.Adam(5e-3), kt.training.SmoothedCrossEntropy(0.1), metrics=metrics)
    return model


def copy_after(steps, folder, copy):
    """Keeps what a process that is killed at the end of that step leaves in the folder."""
    count = itertools.count(1)

    def after(batch, logs):
        if next(count) == steps:
            shutil.copytree(folder, copy)

    return keras.callbacks.LambdaCallback(on_train_batch_end=after)


def shuffled(first_epoch):
    """Three batches in each epoch, of rows in an order that is the epoch's own."""
    epochs = itertools.count(first_epoch)

    def epoch():
        for rows in np.array_split(np.random.default_rng(next(epochs)).permutation(15), 3):
            yield {"token_ids": TOKENS[rows, :-1]}, TOKENS[rows, 1:]

    ids = tf.TensorSpec((None, 8), "int32")
    batches = tf.data.Dataset.from_generator(epoch, output_signature=({"token_ids": ids}, ids))
    return batches.apply(tf.data.experimental.assert_cardinality(3)).prefetch(2)


def resumable(engine, folder, *callbacks):
    """The loss of each epoch, and all variables after two."""
    copies, resume = engine.copy(build(dropout=0.1)), kt.training.Resume(folder, save_freq=1)
    with engine.scope():
        options = {"epochs": 2, "callbacks": [*callbacks, resume], "shuffle": False, "verbose": 0}
        history = copies.fit(engine.rows(shuffled(resume.epoch)), **options).history
    variables = (*copies.weights, *copies.optimizer.variables)
    return history["loss"], [keras.ops.convert_to_numpy(variable) for variable in variables]


def stop_and_resume(engine, folder):
    copies = [copy_after(5, folder / "whole", folder / "parts")] if engine.rank == 0 else []
    losses, whole = resumable(engine, folder / "whole", *copies)
    refusal = ""
    if engine.processes > 1:
        try:
            resumable(engine, folder / ("parts" if engine.rank == 0 else "elsewhere"))
        except ValueError as error:
            refusal = str(error)
    resumed_losses, resumed = resumable(engine, folder / "parts")
    apart = max(np.abs(a.astype(float) - b).max() for a, b in zip(whole, resumed, strict=True) if a.size)
    return {
        "resumed_epochs": len(resumed_losses),
        "resumed_apart": float(apart),
        "losses_apart": abs(losses[-1] - resumed_losses[-1]),
        "left": [path.name for path in folder.iterdir()],
        "refusal": refusal,
    }


def be_exact():
    """On TensorFlow, the same weights bit for bit; and no time for rewriting graphs that run a few steps."""
    tf.config.experimental.enable_op_determinism()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def results(model, batches):
    return model.fit(batches, epochs=5, verbose=0).history


def tokens(model):
    return kt.generation.Generator(model).generate({"token_ids": TOKENS[:, :3]}, 4).tolist()


def train(rank, hosts, folder, answer=None):
    if keras.backend.backend() == "tensorflow":
        be_exact()
    engine = kt.distribution.start(hosts, rank)
    model = build(dropout=0.0)
    batches = tf.data.Dataset.from_tensors(({"token_ids": TOKENS[:, :-1]}, TOKENS[:, 1:])).repeat(2)
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
    resumed = stop_and_resume(engine, folder)
    if engine.rank == 0:
        apart = max(np.abs(a - b).max() for a, b in zip(expected_weights, model.get_weights(), strict=True) if a.size)
        steps = int(model.optimizer.iterations)
        answer.send({"found": found, "expected": expected, "apart": float(apart), "steps": steps, **resumed})
    with engine.scope():
        copies.fit(engine.rows(batches), epochs=10**6, verbose=0)


def train_or_end(*arguments):
    """Ends the process at once where training fails, without waiting for the other one."""
    try:
        train(*arguments)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main():
    folder, *hosts = sys.argv[1:]
    fork = multiprocessing.get_context("fork")  # With all that both would import.
    second = fork.Process(target=train_or_end, args=(1, hosts, Path(folder)))
    second.start()
    answers, answer = fork.Pipe(duplex=False)  # Not held by the second process, hence at its end with the first one.
    first = fork.Process(target=train_or_end, args=(0, hosts, Path(folder), answer))
    first.start()
    answer.close()
    try:
        found = answers.recv()
    except EOFError:
        found = None
    time.sleep(0.5)
    lived = first.is_alive() and second.is_alive()
    second.kill()
    killed = time.monotonic()
    first.join(timeout=60)
    print(json.dumps([found, first.exitcode if lived else None, time.monotonic() - killed]))
    first.kill()


if __name__ == "__main__":
    main()
