"""Compiling a function that calls Keras layers: the one place where generation knows its backend."""

import keras


def can_jit():
    """Whether a compiled loop is the default here: torch runs step by step."""
    return keras.backend.backend() in ("tensorflow", "jax")


def run_once(function, variables, tensors):
    """`function(tensors)`, which is not called again; the arguments are those of `compile_function`.

    JAX would compile each of its operations by itself, which takes several times as long as all of them at once.
    """
    jit = keras.backend.backend() == "jax"
    signature = {name: keras.KerasTensor(x.shape, x.dtype) for name, x in tensors.items()}
    return (compile_function(function, variables, signature, jit) if jit else function)(tensors)


def compile_function(function, variables, signature, jit):
    """A compiled version of a function of tensors.

    Args:
        function: callable of a dict of tensors.
        variables: list of the Keras variables that the function reads. Their values at the time of the call count, also
            after further training.
        signature: dict from name to a `keras.KerasTensor` with None for sizes that may vary.
        jit: boolean. Whether XLA compiles it.

    Returns:
        A callable with the same argument and result.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        specs = {name: tf.TensorSpec(x.shape, x.dtype, name=name) for name, x in signature.items()}
        return tf.function(function, input_signature=[specs], jit_compile=jit, autograph=False)
    if backend == "jax":
        import jax

        def with_values(values, tensors):
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return function(tensors)

        compiled = jax.jit(with_values) if jit else with_values
        return lambda tensors: compiled([variable.value for variable in variables], tensors)

    import torch

    return torch.no_grad()(function)
