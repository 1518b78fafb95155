"""How a model's weights are split over several accelerators, for `keras.distribution`."""

import keras

from keras_transformer.layers import FeedForward, MixtureOfExperts
from keras_transformer.layers.attention import Attention

MODEL_AXIS = "model"
SPLIT = (Attention, FeedForward, MixtureOfExperts)


def layout_map(model, device_mesh):
    """The layout of tensor parallelism for a model of the library's layers.

    Heads and hidden units are split over the mesh's axis `"model"`: the projections that make them by columns, those
    that take them by rows, so that each attention and each feed-forward network costs one sum over the devices
    (Megatron-LM's scheme). Embeddings, and a final projection that is wider than its input, are split by vocabulary
    where it divides, else embeddings by their width where that divides. What is not in the map is held whole on each
    device: norms, positions, what comes before the blocks. Optimizers lay out their own variables as those they belong
    to.

    A layout acts when variables are made, and knows them by their paths: set the distribution first and then make the
    model again, of the same layers by the same names.

    Args:
        model: built `keras.Model` with the library's layers.
        device_mesh: `keras.distribution.DeviceMesh` with an axis called `"model"`, and as a rule another one before
            it, over which batches are split.

    Returns:
        `keras.distribution.LayoutMap` from paths of variables to axes, for `keras.distribution.ModelParallel`.

    Raises:
        ValueError: if the mesh has no axis `"model"`, the model has none of the library's attention or feed-forward
            layers, or heads or hidden units cannot be split evenly.

    Reference: [Megatron-LM](https://arxiv.org/abs/1909.08053), section 3.

    Example:

    >>> import keras_transformer as kt
    >>> mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), ["gpu:0", "gpu:1"])
    >>> model = kt.models.causal_lm(100, dim=16, depth=1, num_heads=2)
    >>> layout = kt.distribution.layout_map(model, mesh)
    >>> layout["decoder_block_0/self_attention/query/kernel"].axes
    (None, 'model')
    """
    if MODEL_AXIS not in device_mesh.axis_names:
        raise ValueError(
            f"`device_mesh` must have an axis called {MODEL_AXIS!r}, over which weights are split; received one with "
            f"the axes {list(device_mesh.axis_names)}."
        )
    size = device_mesh.shape[list(device_mesh.axis_names).index(MODEL_AXIS)]
    layers = list(model._flatten_layers())
    if not any(isinstance(layer, SPLIT) for layer in layers):
        raise ValueError(
            "`model` must have attention or feed-forward layers of keras_transformer, whose weights can be split; "
            f"received {model.name!r} with {sorted({type(layer).__name__ for layer in layers})}."
        )
    inside = {id(part) for layer in layers if isinstance(layer, SPLIT) for part in layer._flatten_layers()}
    axes = {}
    for layer in layers:
        if isinstance(layer, Attention):
            axes |= _attention(layer, size)
        elif isinstance(layer, FeedForward):
            axes |= _feed_forward(layer, size)
        elif isinstance(layer, MixtureOfExperts):
            axes |= _experts(layer, size)
        elif isinstance(layer, keras.layers.Embedding):
            axes |= _embedding(layer, size)
        elif isinstance(layer, keras.layers.Dense) and id(layer) not in inside:
            axes |= _final_projection(layer, size)
    layouts = keras.distribution.LayoutMap(device_mesh)
    for path, split in axes.items():
        layouts[path] = split
    return layouts


def _attention(layer, size):
    for name in ("num_heads", "num_key_value_heads"):
        _check_divides(layer, name, getattr(layer, name) or layer.num_heads, size)
    parts = [_columns(part) for part in (layer.query, layer.key, layer.value)]
    return {path: split for part in [*parts, _rows(layer.output_projection)] for path, split in part.items()}


def _feed_forward(layer, size):
    _check_divides(layer, "hidden_dim", layer.hidden_dim, size)
    gate = _columns(layer.gate) if layer.gated else {}
    return _columns(layer.up) | gate | _rows(layer.down)


def _experts(layer, size):
    _check_divides(layer, "hidden_dim", layer.hidden_dim, size)
    columns = {"up": (None, None, MODEL_AXIS), "up_bias": (None, MODEL_AXIS)}
    columns |= {"gate": (None, None, MODEL_AXIS), "gate_bias": (None, MODEL_AXIS)}
    return _named(layer, {**columns, "down": (None, MODEL_AXIS, None)})


def _embedding(layer, size):
    if layer.input_dim % size == 0:
        return _named(layer, {"embeddings": (MODEL_AXIS, None), "reverse_embeddings": (None, MODEL_AXIS)})
    return _named(layer, {"embeddings": (None, MODEL_AXIS)}) if layer.output_dim % size == 0 else {}


def _final_projection(layer, size):
    inputs, outputs = layer.kernel.shape
    return _columns(layer) if outputs > inputs and outputs % size == 0 else {}


def _columns(dense):
    """A projection whose outputs are split."""
    column = (None, MODEL_AXIS)
    return _named(
        dense, {"kernel": column, "bias": (MODEL_AXIS,), "lora_kernel_b": column, "kernel_scale": (MODEL_AXIS,)}
    )


def _rows(dense):
    """A projection whose inputs are split: each device has a part of the sum, and the whole bias comes after it."""
    return _named(dense, {"kernel": (MODEL_AXIS, None), "lora_kernel_a": (MODEL_AXIS, None)})


def _named(layer, axes):
    """The axes of the layer's own variables, which it has or has not, by their paths."""
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    return {variable.path: axes[variable.name] for variable in own if variable.name in axes}


def _check_divides(layer, name, count, size):
    if count % size:
        raise ValueError(
            f"`{name}` of `{layer.path}` must be a multiple of the {size} devices along the mesh's axis "
            f"{MODEL_AXIS!r}; received {name}={count}."
        )
