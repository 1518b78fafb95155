"""What a SavedModel samples texts with: a function of raw inputs and of the parameters of sampling."""

import inspect

import tensorflow as tf

from keras_transformer.generation import Sampling


def sampled(pipeline, read, raw_inputs):
    """A `tf.function` from raw inputs, parameters of sampling and a seed to texts, with the pipeline's as defaults.

    Args:
        pipeline: `Pipeline` whose generator has a `Sampling`.
        read: function of the raw inputs to what the generator takes.
        raw_inputs: list of their `tf.TensorSpec`.
    """
    sampler = pipeline.generator.sampler
    defaults = {
        "temperature": sampler.temperature,
        "top_k": sampler.top_k or 0,
        "top_p": sampler.top_p or 1.0,
        "max_new_tokens": pipeline.max_new_tokens,
        "seed": -1 if sampler.seed is None else sampler.seed,
    }
    dtypes = {**Sampling.PARAMETERS, "seed": "int32"}

    def sample(*arguments):
        count = len(raw_inputs)
        parameters = dict(zip(defaults, arguments[count:], strict=True))
        seed, new = parameters["seed"], tf.random.uniform((), maxval=2**31 - 1, dtype="int32")
        parameters["seed"] = tf.where(seed < 0, new, seed)
        checks = [
            tf.debugging.assert_positive(parameters["temperature"], "`temperature` must be positive."),
            tf.debugging.assert_non_negative(parameters["top_k"], "`top_k` must be a number of tokens, or 0 for all."),
            tf.debugging.assert_positive(parameters["top_p"], "`top_p` must be greater than 0, and 1 for all tokens."),
            tf.debugging.assert_positive(parameters["max_new_tokens"], "`max_new_tokens` must be at least 1."),
        ]
        with tf.control_dependencies([check for check in checks if check is not None]):
            inputs = read(*(tf.identity(x) for x in arguments[:count]))
        ids = pipeline.generator.generate_tensors(inputs, pipeline.max_new_tokens, parameters)
        return {"text": pipeline._decode_in_graph(ids)}

    # By name, each with its default, as a SavedModel keeps them.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(x.name, kind) for x in raw_inputs]
    options = [
        inspect.Parameter(name, kind, default=tf.constant(value, dtypes[name])) for name, value in defaults.items()
    ]
    sample.__signature__ = inspect.Signature([*names, *options])
    specs = [*raw_inputs, *(tf.TensorSpec((), dtypes[name], name) for name in defaults)]
    return tf.function(sample, input_signature=specs, autograph=False)
