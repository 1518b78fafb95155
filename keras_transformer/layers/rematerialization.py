"""Computing a layer's intermediates again for the gradient, in place of keeping them until then."""

import functools

import keras
from keras import ops

from keras_transformer import scopes
from keras_transformer.ops.looping import recomputed


def rematerializable(call):
    """Makes a layer's `call` one that is rematerialized in training, if the layer's attribute `remat` is true.

    What a scope keeps of a call must outlive it: under one, nothing is computed again.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.layers.rematerialization import rematerializable
    >>> class Square(keras.layers.Layer):
    ...     remat = True
    ...     @rematerializable
    ...     def call(self, x, training=None):
    ...         return x * x
    >>> float(Square()(np.array([3.0]), training=True)[0])
    9.0
    """

    @functools.wraps(call)
    def wrapped(self, *args, training=None, **kwargs):
        here = functools.partial(call, self, training=training)
        plain = not (self.remat and training) or scopes.decoding() is not None or scopes.recording() is not None
        return here(*args, **kwargs) if plain else rematerialized(self, here, *args, **kwargs)

    return wrapped


def rematerialized(layer, call, *args, **kwargs):
    """What `call(*args, **kwargs)` returns, by `keras.remat`: of its intermediates none is kept for the gradient.

    `keras.RematScope` runs a layer's call a second time as it stands: in TensorFlow's graphs and on JAX it may have no
    keyword arguments, and what it draws, changes and adds as a loss is drawn, changed and added twice. Here all that
    the call depends on goes in as tensors, seeds among them, and all that it changes comes out.

    Args:
        layer: built `keras.layers.Layer` that holds every variable that the call reads.
        call: function that computes with the layer, and returns one tensor.
        *args: tensors, or what else the call takes.
        **kwargs: likewise.

    Returns:
        The tensor that `call` returns. The layer's states have changed, and its losses been added, as by `call`.

    Reference: [Training Deep Nets with Sublinear Memory Cost](https://arxiv.org/abs/1604.06174), section 4.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.layers.rematerialization import rematerialized
    >>> layer = keras.layers.Dense(3)
    >>> layer.build((2, 4))
    >>> tuple(rematerialized(layer, layer.call, np.ones((2, 4), "float32")).shape)
    (2, 3)
    """
    trained, states = layer.trainable_variables, layer.non_trainable_variables
    with keras.src.backend.AutocastScope(None):  # Rounding the weights is a part of the call.
        # A cast to its own dtype copies nothing, and makes a tensor of TensorFlow's variables.
        weights, kept = ([ops.cast(x.value, x.dtype) for x in variables] for variables in (trained, states))
    leaves = keras.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if _has_gradient(leaf)]
    changed = []

    def function(*tensors):
        values, others = tensors[: len(weights)], list(leaves)
        for i, x in zip(places, tensors[len(weights) :], strict=True):
            others[i] = x
        args_given, kwargs_given = keras.tree.pack_sequence_as((args, kwargs), others)
        given = zip([*trained, *states], [*values, *kept], strict=True)
        with keras.StatelessScope(given, collect_losses=True) as scope:
            starts = [scope.get_current_value(state) for state in states]
            output, losses = call(*args_given, **kwargs_given), list(scope.losses)
            for part in layer._layers:  # Or else they would take the next loss at this place in memory for their own.
                part._clear_losses()
        ends = [scope.get_current_value(state) for state in states]
        changed[:] = [i for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if end is not start]
        return (output, *losses), [ends[i] for i in changed]

    (output, *losses), ends = recomputed(function, *weights, *(leaves[i] for i in places))
    for i, end in zip(changed, ends, strict=True):
        kept[i] = ops.copy(kept[i])  # torch changes variables in place.
        states[i].assign(end)
    for loss in losses:
        layer.add_loss(loss)
    return output


def _has_gradient(x):
    return hasattr(x, "dtype") and keras.backend.is_float_dtype(x.dtype)
