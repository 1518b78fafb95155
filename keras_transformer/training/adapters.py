"""Adapters of low rank: few weights to train beside the many of a checkpoint."""

import re
import tempfile
import uuid
from pathlib import Path

import keras
import numpy as np

ADAPTED = ("query", "key", "value", "output", "up", "gate", "down")
NEW = ("labels", "label_transform", "pooler")


def add_adapters(model, rank, adapted=ADAPTED, trained=NEW):
    """Freezes a model but for adapters of low rank, which it gets, and a new head.

    Args:
        model: `keras.Model`, built and not yet compiled.
        rank: int. Of the adapters: a kernel of `n` by `m` gets two of `n` by `rank` and `rank` by `m`.
        adapted: names of the layers that get one, in whatever block they are; or str, a pattern that is searched for in
            the paths of layers, such as `r"decoder_block_[01]/self_attention/(query|value)$"`.
        trained: names of layers of the model that are trained as they are.

    Raises:
        ValueError: if `rank` is not positive; if no layer has one of the names, or a path with the pattern, with those
            there are; if none has one of the names that `trained` has besides the default ones; or if Keras cannot
            adapt a layer, which has an adapter already or is quantized with `"gptq"`, with its path.

    Reference: [LoRA](https://arxiv.org/abs/2106.09685).

    Example:

    >>> model = kt.models.transformer(50, 50, dim=16, depth=1, num_heads=2, hidden_dim=32)
    >>> add_adapters(model, 2, adapted=["query", "value"])
    >>> sum(variable.shape[0] * variable.shape[1] for variable in model.trainable_variables)
    384
    """
    if rank < 1:
        raise ValueError(f"`rank` must be a positive integer; received rank={rank}.")
    candidates = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dense)]
    is_pattern = isinstance(adapted, str)
    layers = [x for x in candidates if (re.search(adapted, x.path) if is_pattern else x.name in adapted)]
    if not layers:
        known = [layer.path for layer in candidates] if is_pattern else sorted({layer.name for layer in candidates})
        raise ValueError(
            f"`adapted` must {'match the path' if is_pattern else 'name layers'} of a projection of the model; "
            f"received {adapted!r}, and there are {', '.join(known)}."
        )
    missing = set(trained) - set(NEW) - {variable.path.split("/")[0] for variable in model.trainable_variables}
    if missing:
        raise ValueError(
            f"`trained` must name layers of the model with weights, such as {model.layers[1].name!r}; received "
            f"{sorted(missing)}."
        )
    for layer in layers:
        if getattr(layer, "lora_enabled", False):
            raise ValueError(f"`model` has adapters already, as in `{layer.path}`; merge them, or load it once more.")
        if getattr(layer, "quantization_mode", None) == "gptq":
            raise ValueError(
                f"Keras has no adapters for layers quantized with 'gptq', as `{layer.path}` is; "
                'add them to the model as it was before, or to one quantized with "int8" or "int4".'
            )
    for variable in model.trainable_variables:
        variable.trainable = variable.path.split("/")[0] in trained
    for layer in layers:
        layer.enable_lora(rank)


def save_adapters(model, path):
    """Saves what is trained of a model with adapters, the adapters and a new head, apart from the rest.

    Args:
        model: `keras.Model` that `add_adapters` has prepared.
        path: str or path of a file, as a rule with the ending `.npz`. It appears when all is written.

    Raises:
        ValueError: if the model has no adapters.

    Example:

    >>> import tempfile, pathlib
    >>> model = kt.models.text_classifier(20, 2, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> add_adapters(model, 2, "query$")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_adapters(model, pathlib.Path(directory, "adapters.npz"))
    """
    arrays = {variable.path: keras.ops.convert_to_numpy(variable) for variable in _adapted_variables(model)}
    path = Path(path)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(staging, "wb") as file:
            np.savez(file, **arrays)
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def load_adapters(model, path):
    """Gives a model with adapters the values that `save_adapters` has written.

    Args:
        model: `keras.Model` that `add_adapters` has prepared as the one that was saved.
        path: str or path of the file.

    Raises:
        ValueError: if the file holds other variables, or of other shapes, than the model has; nothing is changed then.

    Example:

    >>> import tempfile, pathlib
    >>> model, again = (kt.models.text_classifier(20, 2, dim=8, depth=1, num_heads=2, hidden_dim=8) for _ in range(2))
    >>> add_adapters(model, 2, "query$")
    >>> add_adapters(again, 2, "query$")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_adapters(model, pathlib.Path(directory, "adapters.npz"))
    ...     load_adapters(again, pathlib.Path(directory, "adapters.npz"))
    >>> len(again.trainable_variables)
    2
    """
    variables = {variable.path: variable for variable in _adapted_variables(model)}
    with np.load(path) as file:
        arrays = dict(file)
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    found = {name: array.shape for name, array in arrays.items()}
    if found != expected:
        name = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[0]
        raise ValueError(
            f"`path` must hold the adapters of a model like this one; {name} has the shape {found.get(name)} in the "
            f"file and {expected.get(name)} in the model."
        )
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _adapted_variables(model):
    if not any(getattr(layer, "lora_enabled", False) for layer in model._flatten_layers()):
        raise ValueError(f"`model` must have adapters, which `add_adapters` gives it; {model.name!r} has none.")
    return model.trainable_variables


def merge_adapters(model, fresh):
    """Gives a model without adapters the weights of one with them, each adapter added to its kernel.

    Args:
        model: `keras.Model` with adapters.
        fresh: `keras.Model` like it, before it got them: loaded or built once more.

    Returns:
        `fresh`, which answers as `model` does.

    Example:

    >>> def build():
    ...     return kt.models.text_classifier(20, 2, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> model, ids = build(), np.array([[3, 1, 4]])
    >>> add_adapters(model, 2)
    >>> merged = merge_adapters(model, build())
    >>> bool(keras.ops.all(keras.ops.isclose(model(ids), merged(ids), atol=1e-5)))
    True
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "merged.weights.h5")
        model.save_weights(path)  # Keras writes the sum.
        fresh.load_weights(path)
    return fresh
