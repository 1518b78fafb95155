"""What Keras' own layers and operations compute between the layers of this library, in plain numpy."""

import keras
import numpy as np

from keras_transformer.inspection.arithmetic import (
    Formula,
    activation,
    affine_formula,
    array,
    norm_formula,
    output,
)
from keras_transformer.inspection.convolution_formulas import convolution_formula, pooling_formula


def _dense(layer):
    function = activation(layer.activation)
    if function is None:
        return None
    name = layer.activation.__name__
    if name == "linear":
        return affine_formula("", lambda dense: dense)(layer)
    inner = affine_formula("", lambda dense: dense, wrap=name + "({})")(layer)
    return Formula(inner.text, lambda dense, x: function(inner.compute(dense, x)))


def _activated(layer):
    function = activation(layer.activation)
    return None if function is None else Formula(f"{layer.activation.__name__}(x)", lambda _, x: function(x))


def _reversible(layer):
    """An embedding one way; the other way round, which floats take, the scores of its rows."""

    def compute(_, x):
        table = array(layer.embeddings)
        if x.dtype.kind != "f":
            return table[x]
        scores = x @ (table.T if layer.tie_weights else array(layer.reverse_embeddings))
        cap = getattr(layer, "logit_soft_cap", None)
        return scores if cap is None else cap * np.tanh(scores / cap)

    return Formula("row of the table, or x · tableᵀ", compute)


def _average(layer):
    if layer.data_format != "channels_last":
        return None

    def compute(_, x, real=None):
        real = np.ones(x.shape[:2], bool) if real is None else real
        sums = np.einsum("btd,bt->bd", x, real) / real.sum(axis=1)[:, None]
        return sums[:, None] if layer.keepdims else sums

    return Formula("mean of the real positions", compute)


def _unmasked(layer, x):
    return np.where((x != layer.mask_value).any(axis=-1, keepdims=True), x, 0)


SAME = output("x, as it is outside of training", lambda _, x: x)
KERAS_LAYERS = {
    keras.layers.ReversibleEmbedding: {
        "output": _reversible,
        "padding_mask": Formula("id != 0", lambda _, ids: ids != 0),
    },
    keras.layers.Embedding: output("row of the table", lambda layer, ids: array(layer.embeddings)[ids]),
    keras.layers.Dense: {"output": _dense},
    keras.layers.Activation: {"output": _activated},
    keras.layers.Conv1D: {"output": convolution_formula},
    keras.layers.Conv2D: {"output": convolution_formula},
    keras.layers.MaxPooling1D: {"output": pooling_formula},
    keras.layers.MaxPooling2D: {"output": pooling_formula},
    keras.layers.GlobalAveragePooling1D: {"output": _average},
    keras.layers.LayerNormalization: {"output": norm_formula},
    keras.layers.RMSNormalization: {"output": norm_formula},
    keras.layers.Add: output("sum", lambda _, *given: sum(given)),
    keras.layers.Reshape: output("x in another shape", lambda layer, x: x.reshape(len(x), *layer.target_shape)),
    keras.layers.Masking: output("x, and 0 where all of a position is padding", _unmasked),
    keras.layers.Dropout: SAME,
    keras.layers.SpatialDropout1D: SAME,
    keras.layers.GaussianNoise: SAME,
    keras.layers.Identity: SAME,
}


def _axis(operation):
    """The axes of a reduction as numpy takes them."""
    return tuple(operation.axis) if isinstance(operation.axis, list) else operation.axis


def _reduced(function):
    return lambda operation, x: function(x, axis=_axis(operation), keepdims=operation.keepdims)


def _along(function):
    return lambda operation, x, *others: function(x, *others, axis=operation.axis)


def _softmax(operation, x):
    exponentials = np.exp(x - x.max(axis=operation.axis, keepdims=True))
    return exponentials / exponentials.sum(axis=operation.axis, keepdims=True)


def _cast(operation, x):
    """Rounding to another dtype of floats is left out: it is what the tolerance is for."""
    return x if "float" in operation.dtype else x.astype(operation.dtype)


def _padded(operation, x, value=None):
    return np.pad(x, operation.pad_width, constant_values=0 if value is None else value)


# By the name of their class, which Keras does not show: what people write, `{}` for each operand, and what it makes.
OPERATIONS = {
    "Add": ("{} + {}", lambda _, x, y: x + y),
    "Subtract": ("{} - {}", lambda _, x, y: x - y),
    "Multiply": ("{} · {}", lambda _, x, y: x * y),
    "Divide": ("{} / {}", lambda _, x, y: x / y),
    "TrueDivide": ("{} / {}", lambda _, x, y: x / y),
    "Matmul": ("{} @ {}", lambda _, x, y: x @ y),
    "Equal": ("{} == {}", lambda _, x, y: x == y),
    "NotEqual": ("{} != {}", lambda _, x, y: x != y),
    "LogicalAnd": ("{} and {}", lambda _, x, y: (x != 0) & (y != 0)),
    "LogicalOr": ("{} or {}", lambda _, x, y: (x != 0) | (y != 0)),
    "LogicalNot": ("not {}", lambda _, x: x == 0),
    "Where": ("{1} where {0} is true, else {2}", lambda _, x, y, z: np.where(x, y, z)),
    "Cast": ("{} as {dtype}", _cast),
    "OnesLike": ("1 for each of {}", lambda _, x: np.ones_like(x)),
    "Cumsum": ("sums of {} up to each, along axis {axis}", _along(np.cumsum)),
    "Softmax": ("softmax({}) along axis {axis}", _softmax),
    "TakeAlongAxis": ("{} at the places {}, along axis {axis}", _along(np.take_along_axis)),
    "Mean": ("mean of {} along axis {axis}", _reduced(np.mean)),
    "Sum": ("sum of {} along axis {axis}", _reduced(np.sum)),
    "Max": ("largest of {} along axis {axis}", _reduced(np.max)),
    "Any": ("any of {} along axis {axis}", _reduced(np.any)),
    "Concatenate": ("side by side along axis {axis}", lambda operation, *xs: np.concatenate(xs, axis=operation.axis)),
    "ExpandDims": ("{} with one more axis, {axis}", lambda operation, x: np.expand_dims(x, operation.axis)),
    "Reshape": ("{} in another shape", lambda operation, x: x.reshape(operation.newshape)),
    "Pad": ("{} with more at the sides", _padded),
}


def operation_formula(operation, sources):
    """The `Formula` of an operation without weights that was called with `sources`, or None where there is none."""
    kind = type(operation).__name__
    if not type(operation).__module__.startswith("keras.") or not _plain(operation, kind):
        return None
    if kind == "GetItem":
        return _item(sources[1])
    if kind not in OPERATIONS:
        return None
    text, compute = OPERATIONS[kind]
    names = [f"{x}" if isinstance(x, bool | int | float) else "xyz"[min(i, 2)] for i, x in enumerate(sources)]
    axis = _axis(operation) if hasattr(operation, "axis") else None
    if isinstance(axis, tuple) and len(axis) == 1:
        (axis,) = axis
    return Formula(text.format(*names, axis=axis, dtype=getattr(operation, "dtype", None)), compute)


def _plain(operation, kind):
    """Whether an operation has none of the rarer options, which the formulas know nothing of."""
    if kind == "Cumsum" and operation.dtype is not None:
        return False
    return getattr(operation, "mode", "constant") == "constant" and getattr(operation, "initial", None) is None


def _item(key):
    """That of `x[key]`, whose key is made of numbers and slices of numbers: Keras takes no other."""
    parts = tuple(key) if isinstance(key, tuple | list) else (key,)
    return Formula(f"x[{', '.join(map(_part, parts))}]", lambda _, x, __: x[parts])


def _part(part):
    if part is Ellipsis:
        return "..."
    if not isinstance(part, slice):
        return str(part)
    start, stop, step = ("" if end is None else str(end) for end in (part.start, part.stop, part.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")
