"""Layers computed without being called, in programs of TensorFlow's XLA, against the layers themselves."""

import re

import keras
import numpy as np
import pytest
from harness import BACKEND, as_numpy, compiled, random
from keras import ops

import keras_transformer as kt
from keras_transformer.layers.sublayers import normalize, project, project_all

Dense, LayerNormalization = keras.layers.Dense, keras.layers.LayerNormalization
tensorflow_alone = pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends call the layers")


class OwnDense(keras.layers.Dense):
    pass


class OwnNorm(keras.layers.LayerNormalization):
    pass


def scattered(layer, shape=(2, 5, 8)):
    layer.build(shape)
    for seed, weight in enumerate(layer.weights):
        weight.assign(np.abs(random(*weight.shape, seed=seed)) + 0.1)
    return layer


def with_adapters(layer):
    scattered(layer).enable_lora(2)
    layer.lora_kernel_b.assign(random(2, 8))
    return layer


def in_int8(layer):
    scattered(layer).quantize("int8")
    return layer


def called(layers, function, monkeypatch):
    """Those of the layers that `function` called for an input, of which it has to give what they give."""
    x = ops.convert_to_tensor(random(2, 5, 8))
    expected, seen = [as_numpy(layer(x)) for layer in layers], []
    for one in layers:
        call = type(one).__call__
        monkeypatch.setattr(
            type(one), "__call__", lambda self, *a, call=call, **k: seen.append(self) or call(self, *a, **k)
        )
    found = function(x)
    monkeypatch.undo()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(as_numpy(one), other, atol=1e-5)
        assert np.abs(other).max() > 0.1
    return [layer for layer in layers if layer in seen]


PROJECTED = {
    "plain": (lambda: Dense(8), False),
    "narrower": (lambda: Dense(4), False),
    "wider": (lambda: Dense(9), True),
    "no bias": (lambda: Dense(8, use_bias=False), True),
    "activation": (lambda: Dense(8, "tanh"), True),
    "regularizer": (lambda: Dense(8, activity_regularizer="l2"), True),
    "half precision": (lambda: Dense(8, dtype="mixed_bfloat16"), True),
    "own class": (lambda: OwnDense(8), True),
    "adapters": (lambda: with_adapters(Dense(8)), True),
    "int8": (lambda: in_int8(Dense(8)), True),
}
NORMS = {
    "plain": (lambda: LayerNormalization(epsilon=0.1), False),
    "root mean square": (lambda: keras.layers.RMSNormalization(epsilon=0.1), False),
    "axis": (lambda: LayerNormalization(axis=[1, 2]), True),
    "no scale": (lambda: LayerNormalization(scale=False), True),
    "no offset": (lambda: LayerNormalization(center=False), True),
    "no mean": (lambda: LayerNormalization(rms_scaling=True), True),
    "half precision": (lambda: LayerNormalization(dtype="mixed_bfloat16"), True),
    "regularizer": (lambda: LayerNormalization(activity_regularizer="l2"), True),
    "own class": (lambda: OwnNorm(), True),
    "batch": (lambda: keras.layers.BatchNormalization(), True),
}


@pytest.mark.parametrize("case", PROJECTED)
def test_a_projection_is_computed_without_its_layer_where_a_bias_is_all_it_adds(case, monkeypatch):
    make, by_layer = PROJECTED[case]
    layer = make()
    layer = layer if layer.built else scattered(layer)
    projected = lambda x: [project(layer, x)]  # noqa: E731
    assert called([layer], projected, monkeypatch) == [layer]  # Nothing is compiled.
    called_layers = [layer] if by_layer or BACKEND != "tensorflow" else []
    assert called([layer], compiled(projected), monkeypatch) == called_layers


@pytest.mark.parametrize("case", NORMS)
def test_a_norm_is_computed_without_its_layer_in_training_where_it_is_one_of_two(case, monkeypatch):
    make, by_layer = NORMS[case]
    layer = scattered(make())
    layer.trainable = case != "batch"  # Frozen, Keras' batch normalization is the same in training.
    for training in (False, True):
        function = compiled(lambda x, training=training: [normalize(layer, x, training)])
        by_program = training and BACKEND == "tensorflow" and not by_layer
        assert called([layer], function, monkeypatch) == ([] if by_program else [layer])


@pytest.mark.parametrize(
    "layers, by_layers",
    [
        ([{}, {}, {}], [False] * 3),
        ([{"use_bias": False}] * 2, [False] * 2),
        ([{}, {"use_bias": False}], [False, True]),
        ([{}, {"activation": "tanh"}], [False, True]),
    ],
    ids=str,
)
def test_projections_of_one_input_are_one_product_in_training(layers, by_layers, monkeypatch):
    layers = [scattered(Dense(8 - 2 * i, **options)) for i, options in enumerate(layers)]
    found = called(layers, compiled(lambda x: project_all(layers, x, True)), monkeypatch)
    assert found == (layers if BACKEND != "tensorflow" else [x for x, by in zip(layers, by_layers, strict=True) if by])


BLOCKS = {
    "pre": {},
    "post": {"norm_position": "post"},
    "sandwich": {"norm_position": "sandwich", "norm": keras.layers.RMSNormalization()},
    "remat": {"remat": True},
}


@tensorflow_alone
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_a_training_step_of_a_block_has_the_same_gradients_compiled_and_sums_no_rows_in_windows(options, monkeypatch):
    import tensorflow as tf

    attention = kt.layers.MultiHeadSelfAttention(4, num_key_value_heads=2, causal=True)
    block = kt.layers.DecoderBlock(attention, kt.layers.FeedForward(32), kt.layers.CrossAttention(2), **options)
    x, context, probe = (ops.convert_to_tensor(random(2, length, 16, seed=length)) for length in (70, 71, 70))
    block(x, context)
    for seed, weight in enumerate(block.weights):
        weight.assign(weight + random(*weight.shape, seed=seed, scale=0.1))

    def step(x, context):
        with tf.GradientTape() as tape:
            tape.watch((x, context))
            output = block(x, context, training=True)
            loss = tf.reduce_sum(output * probe)
        return output, *tape.gradient(loss, [x, context, *block.trainable_weights])

    def windows(step):
        return len(
            re.findall(r" reduce-window\(", step.experimental_get_compiler_ir(x, context)(stage="optimized_hlo"))
        )

    expected, program = step(x, context), tf.function(step, jit_compile=True)
    found, windows_here = program(x, context), windows(program)
    assert len(found) == len(expected) == 3 + len(block.trainable_weights)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(as_numpy(one), as_numpy(other), atol=1e-4 * np.abs(as_numpy(other)).max() + 3e-5)
    monkeypatch.setattr("keras_transformer.layers.sublayers.sums_are_products", lambda: False)
    assert 2 * windows_here < windows(tf.function(step, jit_compile=True))
