"""What the tests of layers share: the harness that every public layer goes through, and the backends' ways of compiling
and differentiating under one name each."""

import collections
import inspect
import itertools
import json
import re

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()
POLICIES = {  # The largest difference to float32, in units of the largest output.
    "float16": 1e-2,
    "mixed_float16": 1e-2,
    "bfloat16": 8e-2,
    "mixed_bfloat16": 8e-2,
}


def random(*shape, seed=0, scale=1.0):
    """Normally distributed float32 array."""
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype("float32")


def lengths(*counts, size):
    """Mask whose rows are True for the first `counts` of `size` positions."""
    return np.arange(size) < np.array(counts)[:, None]


def as_numpy(x):
    """A tensor as an array that numpy can reckon with: what is less precise than float32 becomes float32."""
    x = ops.convert_to_tensor(x)
    half = keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16")
    return ops.convert_to_numpy(ops.cast(x, "float32") if half else x)


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


def compiled(function):
    """`function` as the backend compiles it. Torch runs it as it stands: Keras has no compiled path for it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if BACKEND == "jax":
        import jax

        def pure(*args):
            with keras.StatelessScope():  # What dropout leaves behind must not leave the trace.
                return function(*args)

        return jax.jit(pure)
    return function


def gradients(function, variables):
    """Gradients of the scalar `function()` with respect to `variables`, as arrays; zeros where none depends."""
    values = [v.value for v in variables]
    if not values:
        return []
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = function()
        found = tape.gradient(loss, values, unconnected_gradients="zero")
    elif BACKEND == "jax":
        import jax

        def pure(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function()

        found = jax.grad(pure)(values)
    else:
        import torch

        found = torch.autograd.grad(function(), values, allow_unused=True)
        found = [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]
    return [as_numpy(g) for g in found]


def pairs(**options):
    """The fewest cases, found greedily, in which any two values of different options meet, as dicts."""
    names = list(options)
    every = list(itertools.product(*(range(len(option)) for option in options.values())))
    bits = collections.defaultdict(itertools.count().__next__)  # A number for each two values that are to meet.
    met = {case: sum(1 << bits[two] for two in itertools.combinations(enumerate(case), 2)) for case in every}
    missing = (1 << len(bits)) - 1
    cases = []
    while missing:
        best = max(every, key=lambda case: (met[case] & missing).bit_count())
        missing &= ~met[best]
        cases.append({name: options[name][i] for name, i in zip(names, best, strict=True)})
    return cases


def case_id(case):
    return "-".join(f"{name}={value}" for name, value in case.items()) if isinstance(case, dict) else None


def call(layer, inputs, **kwargs):
    """`layer` on a dict of its call arguments, the first of which goes by position."""
    first, *others = inputs
    return layer(inputs[first], **{name: inputs[name] for name in others}, **kwargs)


def tensors(inputs):
    return {name: ops.convert_to_tensor(value) for name, value in inputs.items()}


def check_layer(layer_class, config, inputs, output_shape=None, no_gradient=("key/bias", "key_norm/beta")):
    """Puts a layer through everything that any Keras layer is expected to stand.

    Args:
        layer_class: class of the layer.
        config: dict of constructor arguments.
        inputs: dict of call arguments to arrays, in the order of the call's signature.
        output_shape: tuple; by default the shape of the first input.
        no_gradient: patterns of the paths of weights whose gradient may vanish. What is added to all keys alike adds
            the same to all scores of a query, and the softmax takes it away.
    """
    arrays, inputs = inputs, tensors(inputs)
    layer = layer_class(**config)
    expected = call(layer, inputs)
    shape = tuple(next(iter(arrays.values())).shape) if output_shape is None else output_shape
    assert tuple(expected.shape) == shape
    assert dtype_of(expected) == layer.compute_dtype == "float32"
    assert np.isfinite(as_numpy(expected)).all()

    check_configuration(layer, layer_class, inputs, expected)
    check_initial_weights(layer)
    check_symbolic(layer, arrays, expected)
    check_compiled(layer, inputs, expected)
    check_training(layer, inputs, expected)
    check_gradients(layer, inputs, expected, no_gradient)
    for policy, tolerance in POLICIES.items():
        check_policy(layer, layer_class, config, inputs, expected, policy, tolerance)
    return layer, expected


def check_configuration(layer, layer_class, inputs, expected):
    config = layer.get_config()
    of_base = keras.layers.Layer().get_config()
    parameters = inspect.signature(layer_class.__init__).parameters.values()
    taken = [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]
    assert [name for name in config if name not in of_base] == taken

    revived = layer_class.from_config(json.loads(json.dumps(config)))
    assert without_build(revived.get_config()) == without_build(config)
    assert not revived.built
    revived.build_from_config(json.loads(json.dumps(layer.get_build_config())))
    assert [type(part) for part in revived._flatten_layers()] == [type(part) for part in layer._flatten_layers()]
    described = [(w.path, tuple(w.shape), w.dtype, w.trainable) for w in layer.weights]
    assert [(w.path, tuple(w.shape), w.dtype, w.trainable) for w in revived.weights] == described
    assert len({path for path, *_ in described}) == len(described)
    revived.set_weights(layer.get_weights())
    np.testing.assert_array_equal(as_numpy(call(revived, inputs)), as_numpy(expected))

    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert type(keras.saving.deserialize_keras_object(serialized)) is layer_class


def without_build(config):
    """A configuration without the shapes that nested layers were built for, which only a built layer knows."""
    if isinstance(config, dict):
        return {name: without_build(value) for name, value in config.items() if name != "build_config"}
    return [without_build(value) for value in config] if isinstance(config, list) else config


def check_initial_weights(layer):
    drawn = [(w.path, value) for w, value in zip(layer.weights, layer.get_weights(), strict=True) if np.ptp(value) > 0]
    for (path, value), (other_path, other) in itertools.combinations(drawn, 2):
        assert value.shape != other.shape or not np.array_equal(value, other), f"{path} starts equal to {other_path}"


def check_symbolic(layer, arrays, expected):
    """Shapes and dtypes that are announced, known and unknown lengths, and a model that is saved and loaded."""
    lengthwise = next(iter(arrays.values())).ndim >= 3
    for known in (True, False):
        symbolic = {}
        for name, value in arrays.items():
            # Only arguments that carry the batch can be inputs of a model; the length is unknown wherever one stands.
            sizes = [size if known or size not in _lengths(arrays) else None for size in value.shape[1:]]
            if value.ndim >= 3 and dtype_of(value) != "bool" and name in ("x", "context", "input"):
                sizes[-1] = value.shape[-1]
            symbolic[name] = keras.Input(sizes, dtype=dtype_of(value), name=name)
        announced = call(layer, symbolic)
        assert dtype_of(announced) == dtype_of(expected)
        assert len(announced.shape) == len(expected.shape)
        for size, actual in zip(announced.shape, expected.shape, strict=True):
            assert size == actual or size is None, f"announced {announced.shape}, received {expected.shape}"
        assert not known or announced.shape[1:] == tuple(expected.shape)[1:]
        model = keras.Model(symbolic, announced)
        if lengthwise:
            np.testing.assert_allclose(as_numpy(model(tensors(arrays))), as_numpy(expected), atol=1e-6)
    check_saving(model, arrays)


def _lengths(arrays):
    """Sizes that are lengths: those of axis 1 of `[B, T, dim]`, or of axis 2 of heads `[B, H, T, D]`."""
    return {value.shape[1 if value.ndim == 3 else 2] for value in arrays.values() if value.ndim >= 3} - {1}


def check_saving(model, arrays):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.models.load_model(f"{folder}/model.keras")
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    for weight, value, other in zip(model.weights, model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other, err_msg=weight.path)
    np.testing.assert_array_equal(as_numpy(loaded(tensors(arrays))), as_numpy(model(tensors(arrays))))


def check_compiled(layer, inputs, expected):
    if BACKEND == "jax":
        import jax

        first, *others = inputs

        def stateless(trainable, non_trainable, values):
            outputs, _ = layer.stateless_call(
                trainable, non_trainable, values[first], **{name: values[name] for name in others}
            )
            return outputs

        trainable = [v.value for v in layer.trainable_variables]
        non_trainable = [v.value for v in layer.non_trainable_variables]
        output = jax.jit(stateless)(trainable, non_trainable, inputs)
    else:
        output = compiled(lambda values: call(layer, values))(inputs)
    np.testing.assert_allclose(as_numpy(output), as_numpy(expected), atol=1e-5, rtol=1e-5)


def check_training(layer, inputs, expected):
    """Dropout, if there is any, acts in training alone, and differently at each call."""
    if "training" not in inspect.signature(layer.call).parameters:
        return
    first, second = (as_numpy(call(layer, inputs, training=True)) for _ in range(2))
    assert np.isfinite(first).all()
    rates = [part.rate for part in layer._flatten_layers() if isinstance(part, keras.layers.Dropout)]
    if any(rates):
        assert not np.array_equal(first, second)
    elif not hasattr(layer, "seed_generator"):  # What draws by itself has a test of its own.
        np.testing.assert_allclose(first, as_numpy(expected), atol=1e-5)
    np.testing.assert_array_equal(as_numpy(call(layer, inputs, training=False)), as_numpy(expected))


def check_gradients(layer, inputs, expected, no_gradient):
    # Weighted at random: the plain sum of what a norm gives is constant.
    probe = ops.convert_to_tensor(random(*expected.shape, seed=7))
    found = gradients(lambda: ops.sum(call(layer, inputs) * probe), layer.trainable_weights)
    for weight, gradient in zip(layer.trainable_weights, found, strict=True):
        assert np.isfinite(gradient).all(), weight.path
        may_vanish = any(re.search(pattern, weight.path) for pattern in no_gradient)
        assert may_vanish or np.abs(gradient).max() > 1e-7, f"{weight.path} gets no gradient"


def check_policy(layer, layer_class, config, inputs, expected, policy, tolerance):
    half = layer_class(**config, dtype=policy)
    announced = call(half, {name: keras.KerasTensor(value.shape, dtype_of(value)) for name, value in inputs.items()})
    for part in half._flatten_layers():
        assert part.dtype_policy.name == policy, f"{part.path} has the policy {part.dtype_policy.name}"
    for weight in half.trainable_weights:
        assert dtype_of(weight) == half.variable_dtype
    half.set_weights(layer.get_weights())
    output = call(half, inputs)
    assert dtype_of(output) == dtype_of(announced) == half.compute_dtype
    largest = max(1.0, np.abs(as_numpy(expected)).max())
    np.testing.assert_allclose(as_numpy(output), as_numpy(expected), atol=tolerance * largest, rtol=0)
