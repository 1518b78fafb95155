"""Calls of the Keras layers that attention, feed-forward layers and blocks are made of, in the quickest way."""

import keras
import numpy as np
from keras import ops

from keras_transformer import scopes
from keras_transformer.ops.products import sums_are_products, trained_bias, trained_norm


def project(layer, x):
    """`layer(x)` for a `keras.layers.Dense`, by the products of the current `DecodingScope` if it has any."""
    by = scopes.products()
    if by is not None:
        return by.dense(layer, x)
    if not sums_are_products() or not _is_linear(layer, x) or not layer.use_bias or layer.units > x.shape[-1]:
        return layer(x)  # What widens goes into an activation, whose gradient XLA sums on all cores.
    return trained_bias(ops.matmul(x, ops.convert_to_tensor(layer.kernel)), ops.convert_to_tensor(layer.bias))


def project_all(layers, x, training):
    """`[project(layer, x) for layer in layers]`, of which one product is quicker for a gradient on a CPU."""
    pays = training and scopes.products() is None and sums_are_products()
    if not pays or not all(_is_linear(layer, x) for layer in layers) or len({layer.use_bias for layer in layers}) > 1:
        return [project(layer, x) for layer in layers]
    y = ops.matmul(x, ops.concatenate([ops.convert_to_tensor(layer.kernel) for layer in layers], axis=1))
    if layers[0].use_bias:
        y = trained_bias(y, ops.concatenate([ops.convert_to_tensor(layer.bias) for layer in layers], axis=0))
    return ops.split(y, np.cumsum([layer.units for layer in layers])[:-1].tolist(), axis=-1)


def normalize(layer, x, training):
    """`layer(x, training=training)` for a layer that normalizes."""
    parameters = _parameters_of_norm(layer, x) if training and sums_are_products() else None
    if parameters is None:
        return layer(x, training=training)
    return trained_norm(x, *map(ops.convert_to_tensor, parameters), epsilon=layer.epsilon)


def _is_linear(layer, x):
    """Whether a layer multiplies float32 numbers with its kernel, adds its bias, and does no more."""
    plain = type(layer) is keras.layers.Dense and layer.quantization_mode is None and not layer.lora_enabled
    linear = plain and layer.activation in (None, keras.activations.linear) and layer.activity_regularizer is None
    return linear and _is_in_float32(layer, x)


def _parameters_of_norm(layer, x):
    """What a layer multiplies float32 numbers with that it normalized over the last axis, and what it adds, or None.

    Layer normalization has both, that by the root mean square the first alone; others are for their layers to compute.
    """
    if type(layer) not in (keras.layers.LayerNormalization, keras.layers.RMSNormalization):
        return None
    over_last = keras.tree.flatten(layer.axis) in ([-1], [len(x.shape) - 1])
    if not over_last or layer.activity_regularizer is not None or not _is_in_float32(layer, x):
        return None
    if type(layer) is keras.layers.RMSNormalization:
        return (layer.scale,)
    return (layer.gamma, layer.beta) if layer.scale and layer.center and not layer.rms_scaling else None


def _is_in_float32(layer, x):
    dtypes = (layer.compute_dtype, layer.variable_dtype, keras.backend.standardize_dtype(x.dtype))
    return set(dtypes) == {"float32"}
