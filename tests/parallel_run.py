"""Trains and generates on eight virtual devices of one processor under JAX, split in several ways; prints JSON.

KERAS_BACKEND=jax XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/parallel_run.py
"""

import json

import jax
import keras
import numpy as np

import keras_transformer as kt

LAYOUTS = {"one": None, "data 8": (8, 1), "tensor 8": (1, 8), "2 x 4": (2, 4)}
rng = np.random.default_rng(0)
SOURCE = rng.integers(3, 64, (16, 8)).astype("int32")
TARGET = np.concatenate([np.ones((16, 1), "int32"), SOURCE[:, ::-1]], axis=1)


def run(base, shape):
    """Losses of 20 steps, tokens generated after them, and the shape of each variable's part on a device."""
    if shape is None:
        return train(keras.models.clone_model(base), base)
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), keras.distribution.list_devices())
    layout = kt.distribution.layout_map(base, mesh)
    with keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch").scope():
        return train(keras.models.clone_model(base), base)


def train(model, base):
    model.set_weights(base.get_weights())
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    inputs = {"source_ids": SOURCE, "target_ids": TARGET[:, :-1]}
    losses = model.fit(inputs, TARGET[:, 1:], epochs=20, batch_size=16, shuffle=False, verbose=0).history["loss"]
    tokens = kt.generation.Generator(model, start_id=1).generate({"source_ids": SOURCE}, 6)
    return {
        "losses": losses,
        "tokens": tokens.tolist(),
        "shapes": {variable.path: variable.shape for variable in model.variables},
        "parts": {variable.path: part(variable) for variable in model.variables},
        "optimizer_parts": {variable.path: part(variable) for variable in model.optimizer.variables},
    }


def part(variable):
    return variable.value.sharding.shard_shape(variable.value.shape)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    keras.utils.set_random_seed(0)
    base = kt.models.transformer(64, 64, dim=32, depth=1, num_heads=8, hidden_dim=64, dropout=0.0)
    print(json.dumps({name: run(base, shape) for name, shape in LAYOUTS.items()}))
