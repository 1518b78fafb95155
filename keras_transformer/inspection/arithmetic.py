"""What the formulas of several kinds of layers share, in plain numpy."""

import math

import keras
import numpy as np


class Formula:
    """How one kind of step is computed.

    Attributes:
        text: str. The formula, as people write it.
        compute: function `(layer, *sources)` of a layer and arrays to an array.
        kind: str. How the page puts numbers in: `"affine"`, `"scaled"`, `"softmax"`, `"sum"`, `"layer_norm"`,
            `"rms_norm"`, or None.
        dense: the `Dense` layer of an affine step, or None.
    """

    def __init__(self, text, compute, kind=None, dense=None):
        self.text = text
        self.compute = compute
        self.kind = kind
        self.dense = dense


def array(weight):
    return np.asarray(keras.ops.convert_to_numpy(weight), "float64")


def affine(layer, x):
    kernel = array(layer.kernel)
    result = np.tensordot(x, kernel, 1)
    return result if getattr(layer, "bias", None) is None else result + array(layer.bias)


def affine_formula(name, projection, read=None, wrap="{}"):
    """The `Formula` of a `Dense` layer inside of another, `projection(layer)`: `x · W + b`, or without `b`."""

    def found(layer):
        dense = projection(layer)
        end = f"_{name}" if name else ""
        text = f"{read or 'x'} · W{end}" + ("" if dense.bias is None else f" + b{end}")
        return Formula(wrap.format(text), lambda _, x: affine(dense, x), "affine", dense)

    return found


def split(x, heads):
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def softmax(scores):
    """Softmax over the last axis; a row of nothing but minus infinity becomes 0."""
    largest = scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / np.where(total == 0, 1, total)


def normalized(layer, x):
    axes = tuple(layer.axis) if isinstance(layer.axis, list | tuple) else (layer.axis,)
    if isinstance(layer, keras.layers.RMSNormalization):
        result = x / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + layer.epsilon)
        return result * array(layer.scale)
    centered = x - x.mean(axis=axes, keepdims=True)
    result = centered / np.sqrt(np.mean(centered * centered, axis=axes, keepdims=True) + layer.epsilon)
    result = result * array(layer.gamma) if layer.gamma is not None else result
    return result + array(layer.beta) if layer.beta is not None else result


def norm_formula(layer):
    if isinstance(layer, keras.layers.RMSNormalization):
        return Formula("x / sqrt(mean(x²) + ε) · scale", lambda _, x: normalized(layer, x), "rms_norm")
    if type(layer) is keras.layers.LayerNormalization:
        return Formula("(x - mean(x)) / sqrt(var(x) + ε) · γ + β", lambda _, x: normalized(layer, x), "layer_norm")
    return None


def _gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=["float64"])(x / math.sqrt(2)))


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "softmax": softmax,
}


def activation(function):
    return ACTIVATIONS.get(getattr(function, "__name__", None))


def output(text, compute):
    """The formulas of a layer of which only the output is recorded."""
    return {"output": Formula(text, compute)}
