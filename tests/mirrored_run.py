"""Trains on two virtual devices of one processor under `tf.distribute.MirroredStrategy`, and resumes; prints JSON.

KERAS_BACKEND=tensorflow python tests/mirrored_run.py folder
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import process_run
import tensorflow as tf

import keras_transformer as kt


def main():
    processor = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
    process_run.be_exact()
    engine = kt.distribution.start()
    model, inputs = process_run.build(dropout=0.0), {"token_ids": process_run.TOKENS[:, :-1]}
    batches = tf.data.Dataset.from_tensors((inputs, process_run.TOKENS[:, 1:])).repeat(2)
    copies = engine.copy(model)
    expected = process_run.results(model, batches)
    with engine.scope():
        found = process_run.results(copies, engine.rows(batches))
    parts = engine.strategy.experimental_local_results(copies.trainable_variables[0].value)
    result = {"found": found, "expected": expected, "devices": [part.device for part in parts]}
    result |= process_run.stop_and_resume(engine, Path(sys.argv[1]))
    print(json.dumps(result | without_engine(engine.strategy, Path(sys.argv[1]))))


def without_engine(strategy, folder):
    """The strategy alone, whose copies Keras feeds from arrays."""

    def fit(folder, *callbacks, accumulated=None):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            layers = [keras.layers.Dense(4), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
            model = keras.Sequential([keras.Input((3,)), *layers])
            model.compile(keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulated), "mse", metrics=["mae"])
        resume, x = kt.training.Resume(folder, save_freq=2), np.random.default_rng(0).normal(size=(12, 3))
        options = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0, "callbacks": [*callbacks, resume]}
        model.fit(x, x.sum(axis=1, keepdims=True), **options)
        variables = (*model.weights, *model.optimizer.variables)
        return [keras.ops.convert_to_numpy(variable) for variable in variables]

    whole = fit(folder / "alone", process_run.copy_after(9, folder / "alone", folder / "alone_parts"))
    resumed = fit(folder / "alone_parts")
    try:
        fit(folder / "sums", accumulated=2)
    except ValueError as error:
        refusal = str(error)
    equal = all(np.array_equal(*pair) for pair in zip(whole, resumed, strict=True))
    return {"equal_without_engine": equal, "refusal_of_sums": refusal}


if __name__ == "__main__":
    main()
