"""Gradients of a model's own loss: the one place where training asks a backend for them."""

import keras
from keras import ops


def gradients(model, inputs, targets):
    """The gradient of each trainable variable of a compiled model, as arrays, for one batch; nothing of it changes.

    Args:
        model: compiled `keras.Model`.
        inputs: what the model takes.
        targets: what its loss takes.
    """
    backend = keras.backend.backend()
    variables = model.trainable_variables
    targets = keras.tree.map_structure(ops.convert_to_tensor, targets)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = model.compute_loss(inputs, targets, model(inputs, training=False))
        found = tape.gradient(loss, [variable.value for variable in variables])
        found = [None if x is None else tf.convert_to_tensor(x) for x in found]
    elif backend == "jax":
        import jax

        def loss(values):
            outputs, _ = model.stateless_call(values, fixed, inputs, training=False)
            return model.compute_loss(inputs, targets, outputs)

        fixed = [variable.value for variable in model.non_trainable_variables]
        found = jax.grad(loss)([variable.value for variable in variables])
    else:
        import torch

        with torch.enable_grad():
            loss = model.compute_loss(inputs, targets, model(inputs, training=False))
            found = torch.autograd.grad(loss, [variable.value for variable in variables], allow_unused=True)
    return [None if x is None else ops.convert_to_numpy(x) for x in found]
