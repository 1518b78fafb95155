"""Adapters of low rank: few weights to train beside the many of a checkpoint."""

import tempfile
from pathlib import Path

import keras

ADAPTED = ("query", "key", "value", "output", "up", "gate", "down")
NEW = ("labels", "label_transform", "pooler")


def add_adapters(model, rank, adapted=ADAPTED, trained=NEW):
    """Freezes a model but for adapters of low rank, which it gets, and a new head.

    Args:
        model: `keras.Model`, built and not yet compiled.
        rank: int. Of the adapters: a kernel of `n` by `m` gets two of `n` by `rank` and `rank` by `m`.
        adapted: names of the layers that get one, in whatever block they are.
        trained: names of layers of the model that are trained as they are.

    Raises:
        ValueError: if `rank` is not positive, no layer has one of the names `adapted`, or none has one of those that
            `trained` has besides the default ones.

    Reference: [LoRA](https://arxiv.org/abs/2106.09685).

    Example:

    >>> model = kt.models.transformer(50, 50, dim=16, depth=1, num_heads=2, hidden_dim=32)
    >>> add_adapters(model, 2, adapted=["query", "value"])
    >>> sum(variable.shape[0] * variable.shape[1] for variable in model.trainable_variables)
    384
    """
    if rank < 1:
        raise ValueError(f"`rank` must be a positive integer; received rank={rank}.")
    layers = [x for x in model._flatten_layers() if isinstance(x, keras.layers.Dense) and x.name in adapted]
    if not layers:
        raise ValueError(f"`adapted` must name layers of the model; none is named {', '.join(adapted)}.")
    missing = set(trained) - set(NEW) - {variable.path.split("/")[0] for variable in model.trainable_variables}
    if missing:
        raise ValueError(
            f"`trained` must name layers of the model with weights, such as {model.layers[1].name!r}; received "
            f"{sorted(missing)}."
        )
    for variable in model.trainable_variables:
        variable.trainable = variable.path.split("/")[0] in trained
    for layer in layers:
        layer.enable_lora(rank)


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
