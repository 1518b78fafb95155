"""What the backends have no common name for: loops that take one step after the other, and gradients of one's own."""

import keras
from keras import ops


def compiled_by_xla():
    """Whether what is called now becomes part of a program that XLA compiles."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        return backend == "jax"
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def compiled_by_xla_for_cpu():
    """Whether what is called now becomes part of a program that XLA compiles where there is nothing but CPUs."""
    if not compiled_by_xla():
        return False
    if keras.backend.backend() == "jax":
        return on_cpu(None)
    import tensorflow as tf

    return not tf.config.list_logical_devices("GPU")


def on_cpu(x):
    """Whether JAX or torch computes with `x` on a CPU."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    return x.device.type == "cpu"


def walk(count, step, carried, dtypes):
    """Takes steps, each after the one before it is done, so that no two hold their intermediates at once.

    Args:
        count: int, or an int tensor where the number is not known before a graph runs.
        step: function `(i, carried)` to the carried tuple after step `i` and a tuple of tensors to keep.
        carried: tuple of tensors, whose shapes stay the same.
        dtypes: tuple of str. The dtypes of what a step keeps.

    Returns:
        The carried tuple after the last step, and a tuple of what was kept, each with a new first axis of `count`.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.looping import walk
    >>> step = lambda i, carried: ((carried[0] + i,), (carried[0] * 10,))
    >>> total, kept = walk(4, step, (keras.ops.zeros((), "int32"),), ("int32",))
    >>> int(total[0]), keras.ops.convert_to_numpy(kept[0]).tolist()
    (6, [0, 0, 10, 30])
    """
    if isinstance(count, int) and count == 1:
        carried, kept = step(0, carried)
        return carried, tuple(ops.expand_dims(x, 0) for x in kept)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.lax.scan(lambda carried, i: step(i, carried), carried, jax.numpy.arange(count))
    if backend == "tensorflow":
        import tensorflow as tf

        def body(i, carried, arrays):
            carried, kept = step(i, carried)
            return i + 1, carried, tuple(array.write(i, x) for array, x in zip(arrays, kept, strict=True))

        arrays = tuple(tf.TensorArray(dtype, size=count) for dtype in dtypes)
        state = (tf.constant(0), carried, arrays)
        _, carried, arrays = tf.while_loop(lambda i, *_: i < count, body, state, parallel_iterations=1)
        return carried, tuple(array.stack() for array in arrays)
    steps = []
    for i in range(count):
        carried, kept = step(i, carried)
        steps.append(kept)
    return carried, tuple(ops.stack(kept) for kept in zip(*steps, strict=True))


def with_gradient(forward, backward):
    """A function whose gradient is another function, not what the backend would derive.

    Args:
        forward: function `(tensors, others)` to the output and a tuple of tensors to keep for the gradient, where
            `tensors` and `others` are tuples of tensors or None, and only the first have gradients.
        backward: function `(tensors, others, kept, gradient)`, the last that of the output, to a tuple of the gradients
            of `tensors`, None for those that are None.

    Returns:
        Function `(tensors, others)` to the output. Keep it from call to call: JAX compiles it once.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.looping import with_gradient
    >>> clipped = with_gradient(lambda x, _: (keras.ops.clip(x[0], 0, 1), ()), lambda x, others, kept, gradient: (gradient,))
    >>> float(clipped((keras.ops.convert_to_tensor(3.0),), ()))
    1.0
    """  # noqa: E501
    return globals()[f"_with_gradient_of_{keras.backend.backend()}"](forward, backward)


def recomputed(function, *tensors):
    """What `function(*tensors)` returns, which the gradient computes again: nothing on the way there is kept.

    Args:
        function: function of tensors that have gradients to a tuple of tensors that have them as well, and a list of
            tensors that have none.
        *tensors: its arguments.

    Returns:
        The tuple and the list.

    Example:

    >>> import keras
    >>> from keras_transformer.ops.looping import recomputed
    >>> (square,), (count,) = recomputed(lambda x: ((x * x,), [keras.ops.size(x)]), keras.ops.ones(3) * 2)
    >>> keras.ops.convert_to_numpy(square).tolist(), int(count)
    ([4.0, 4.0, 4.0], 3)
    """
    if keras.backend.backend() == "jax":
        return (_recomputed_late(function) if on_cpu(None) else keras.remat(function))(*tensors)
    others = []

    def with_gradients_alone(*tensors):
        outputs, rest = function(*tensors)
        others.append(rest)
        return outputs

    # TensorFlow has no gradient to hand to what has none, and no need to be handed it: graphs let their tensors out.
    return keras.remat(with_gradients_alone)(*tensors), others[0]


def _recomputed_late(function):
    """`jax.checkpoint` for CPUs, where XLA forgets its barriers before it orders the program, and computes again early.

    Here the second run waits for a number of the gradient that it is for.
    """
    import jax

    outputs_of = jax.custom_vjp(function)

    def backward(tensors, gradients):
        number = ops.reshape(gradients[0][0], (-1,))[0]
        nothing = ops.where(number == number, 0.0, float("nan"))  # XLA cannot know that it is 0.
        _, gradients_of = jax.vjp(function, *(x + ops.cast(nothing, x.dtype) for x in tensors))
        return gradients_of(gradients)

    outputs_of.defvjp(lambda *tensors: (function(*tensors), tensors), backward)
    return outputs_of


def _with_gradient_of_jax(forward, backward):
    import jax

    function = jax.custom_vjp(lambda tensors, others: forward(tensors, others)[0])

    def keeping(tensors, others):
        output, kept = forward(tensors, others)
        return output, (tensors, others, kept)

    function.defvjp(keeping, lambda kept, gradient: (backward(*kept, gradient), None))
    return jax.jit(function)


def _with_gradient_of_tensorflow(forward, backward):
    import tensorflow as tf

    @tf.autograph.experimental.do_not_convert
    def function(tensors, others):
        @tf.custom_gradient
        def differentiable(*given):
            values = iter(given)
            full = tuple(None if x is None else next(values) for x in tensors)
            output, kept = forward(full, others)

            def gradients(gradient):
                found = backward(full, others, kept, gradient)
                return [x for x in found if x is not None]

            return output, gradients

        # A variable that is read inside would ask for a gradient of its own.
        return differentiable(*(tf.convert_to_tensor(x) for x in tensors if x is not None))

    return function


def _with_gradient_of_torch(forward, backward):
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(context, others, *tensors):
            output, kept = forward(tensors, others)
            context.save_for_backward(*tensors, *others, *kept)
            context.counts = len(tensors), len(others)
            return output

        @staticmethod
        def backward(context, gradient):
            saved, (first, second) = context.saved_tensors, context.counts
            parts = saved[:first], saved[first : first + second], saved[first + second :]
            return None, *backward(*parts, gradient)

    return lambda tensors, others: Function.apply(others, *tensors)
