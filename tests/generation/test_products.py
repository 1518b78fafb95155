"""Products in another order than the layers', and what they are the same as."""

import keras
import numpy as np
import pytest
from harness import as_numpy, compiled, random
from keras import ops

import keras_transformer as kt
from keras_transformer.generation import Generator
from keras_transformer.generation import products as products_module
from keras_transformer.generation.graph import DecodingGraph
from keras_transformer.generation.products import StepProducts, by_parts, from_the_left


class Spy(keras.layers.Dense):
    """Says that it was called."""

    def call(self, *_, **__):
        raise RuntimeError("called")


def language_model(tied):
    return kt.models.causal_lm(30, dim=16, depth=2, num_heads=2, dropout=0.0, tied_output=tied)


def scattered(model):
    for seed, weight in enumerate(model.weights):
        weight.assign(random(*weight.shape, seed=seed, scale=0.5) if len(weight.shape) == 2 else weight)
    return model


@pytest.fixture
def products():
    return StepProducts(DecodingGraph(language_model(tied=True)))


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"activation": "gelu"}], ids=str)
def test_a_row_by_a_dense_layer_without_calling_it(products, options):
    layer, x = keras.layers.Dense(12, bias_initializer="normal", **options), random(1, 1, 16)
    expected = as_numpy(layer(x))
    found = as_numpy(products.dense(layer, ops.convert_to_tensor(x)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() > 0.1
    spy = Spy(12)
    spy.build((1, 1, 16))
    products.dense(spy, ops.convert_to_tensor(x))


@pytest.mark.parametrize(
    "shape, options", [((2, 1, 16), {}), ((1, 3, 16), {}), ((1, 1, 6), {}), ((1, 1, 16), {"dtype": "mixed_float16"})]
)
def test_other_rows_go_to_the_layer(products, shape, options):
    spy, x = Spy(12, **options), ops.convert_to_tensor(random(*shape))
    spy.build(shape)
    with pytest.raises(RuntimeError, match="called"):
        products.dense(spy, ops.cast(x, spy.compute_dtype))


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"activation": "gelu"}], ids=str)
def test_a_row_by_a_quantized_layer_without_calling_it(products, options, monkeypatch):
    layer, x = keras.layers.Dense(12, bias_initializer="normal", **options), random(1, 1, 16)
    layer.build((1, 1, 16))
    layer.quantize("int8")
    expected = as_numpy(layer(x))
    monkeypatch.setattr(layer, "call", lambda *_, **__: pytest.fail("called"))
    monkeypatch.setattr(layer, "quantized_call", lambda *_, **__: pytest.fail("called"))
    np.testing.assert_allclose(as_numpy(products.dense(layer, ops.convert_to_tensor(x))), expected, atol=1e-6)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("case", ["int4", "12 inputs", "adapters", "weights alone"])
def test_a_row_that_a_quantized_layer_multiplies_itself(products, case, monkeypatch):
    size = 12 if case == "12 inputs" else 16
    layer, x = keras.layers.Dense(12, bias_initializer="normal"), random(1, 1, size)
    layer.build((1, 1, size))
    if case == "weights alone":
        layer.quantize(config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None))
    else:
        layer.quantize("int4" if case == "int4" else "int8")
    if case == "adapters":
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(random(2, 12))
    expected, seen, call = as_numpy(layer(x)), [], layer.quantized_call
    monkeypatch.setattr(layer, "quantized_call", lambda x, **options: seen.append(1) or call(x, **options))
    np.testing.assert_allclose(as_numpy(products.dense(layer, ops.convert_to_tensor(x))), expected, atol=1e-6)
    assert seen and np.abs(expected).max() > 0.1


@pytest.mark.parametrize("soft_cap", [None, 0.5])
def test_a_row_by_a_quantized_tied_output(soft_cap):
    model, x = language_model(tied=True), ops.convert_to_tensor(random(1, 1, 16))
    model.get_layer("embedding").logit_soft_cap = soft_cap
    model.quantize("int8")
    embedding = model.get_layer("embedding")
    found = StepProducts(DecodingGraph(model)).tied_output(embedding, x)
    np.testing.assert_allclose(as_numpy(found), as_numpy(embedding(x, reverse=True)), atol=1e-6)
    rows = ops.convert_to_tensor(random(2, 1, 16))
    for weights_first in (False, True):
        assert StepProducts(DecodingGraph(model), weights_first).tied_output(embedding, rows) is None


@pytest.mark.parametrize("shape", [(4, 1), (2, 3)])
def test_several_rows_by_weights_on_the_left(shape, monkeypatch):
    model, x = language_model(tied=False), ops.convert_to_tensor(random(*shape, 16))
    graph = DecodingGraph(model)
    layers = [layer for layer in graph.decoder_layers() if isinstance(layer, keras.layers.Dense)]
    layers = [layer for layer in layers if layer.kernel.shape[0] == 16]
    expected = [as_numpy(layer(x)) for layer in layers]
    products = StepProducts(graph, weights_first=True)
    for layer in layers:
        monkeypatch.setattr(layer, "call", lambda *_, **__: pytest.fail("called"))
    for layer, values in zip(layers, expected, strict=True):
        np.testing.assert_allclose(as_numpy(products.dense(layer, x)), values, atol=1e-5)
    assert len(layers) == 2 * 5 + 1 and max(np.abs(values).max() for values in expected) > 0.1


def test_layers_that_are_not_the_graphs_multiply_several_rows_themselves():
    layer, x = keras.layers.Dense(12), ops.convert_to_tensor(random(4, 1, 16))
    found = StepProducts(DecodingGraph(language_model(tied=False)), weights_first=True).dense(layer, x)
    np.testing.assert_allclose(as_numpy(found), as_numpy(layer(x)), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vectors_of_8", [True, False])
def test_where_weights_come_first(dtype, vectors_of_8, monkeypatch):
    monkeypatch.setattr(products_module, "has_vectors_of_8", lambda: vectors_of_8)
    pairs = [(rows, steps) for rows in (None, 1, 3, 4, 64, 65) for steps in (15, 16)]
    found = [pair for pair in pairs if StepProducts.weights_come_first(*pair, dtype)]
    assert found == ([(None, 16), (4, 16), (64, 16)] if dtype == "float32" and vectors_of_8 else [])


@pytest.mark.parametrize(
    "baseline, found, answer",
    [
        (["X86_V2"], ["X86_V3"], True),
        (["SSE", "SSE2"], ["AVX", "AVX2"], True),
        (["X86_V3"], [], True),
        (["X86_V2"], ["X86_V3", "X86_V4"], False),
        (["SSE"], ["AVX2", "AVX512F"], False),
        (["NEON"], ["ASIMDHP"], False),
    ],
)
def test_processors_whose_vectors_hold_8_floats(baseline, found, answer, monkeypatch):
    config = {"SIMD Extensions": {"baseline": baseline, "found": found, "not found": ["AVX2"]}}
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    assert products_module.has_vectors_of_8.__wrapped__() == answer


@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("weights_first", [False, True])
def test_the_tied_output_is_that_of_the_embedding(rows, soft_cap, weights_first):
    model = language_model(tied=True)
    embedding, x = model.get_layer("embedding"), random(rows, 1, 16)
    embedding.logit_soft_cap = soft_cap
    products = StepProducts(DecodingGraph(model), weights_first)
    found = products.tied_output(embedding, ops.convert_to_tensor(x))
    np.testing.assert_allclose(as_numpy(found), as_numpy(embedding(x, reverse=True)), atol=1e-5)
    assert StepProducts(DecodingGraph(language_model(tied=True))).tied_output(embedding, x) is None


@pytest.mark.compiled
@pytest.mark.parametrize(
    "tied, sampler, mode",
    [(True, "greedy", None), (True, "beam_search", None), (False, "beam_search", None), (False, "greedy", "int8")],
)
def test_one_row_compiled_goes_on_as_in_a_batch_that_is_not(tied, sampler, mode):
    model = scattered(language_model(tied))
    if mode is not None:
        model.quantize(mode)
    prompts = np.array([[3, 4, 5, 6], [0, 9, 8, 7]], "int32")
    expected = Generator(model, sampler=sampler, jit_compile=False).generate(prompts, 6)
    assert tied or len(np.unique(expected)) > 1  # A tied output mostly repeats the token that goes in.
    generator = Generator(model, sampler=sampler)
    for row in range(2):
        np.testing.assert_array_equal(generator.generate(prompts[row : row + 1], 6), expected[row : row + 1])


@pytest.mark.compiled
@pytest.mark.parametrize("tied, sampler", [(True, "greedy"), (False, "greedy"), (False, "beam_search")])
def test_weights_on_the_left_compiled_go_on_as_without(tied, sampler, monkeypatch):
    model = scattered(language_model(tied))
    prompts = np.array([[3, 4, 5, 6], [0, 9, 8, 7], [0, 0, 2, 9], [7, 7, 1, 3]], "int32")
    prompts = prompts[:1] if sampler == "beam_search" else prompts
    expected = Generator(model, sampler=sampler, jit_compile=False).generate(prompts, 16)
    asked = []
    monkeypatch.setattr(products_module, "has_vectors_of_8", lambda: True)
    monkeypatch.setattr(products_module, "from_the_left", lambda *x: asked.append(1) or from_the_left(*x))
    found = Generator(model, sampler=sampler).generate(prompts, 16)
    np.testing.assert_array_equal(found, expected)
    assert bool(asked) == (keras.backend.backend() != "torch")


@pytest.mark.compiled
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's")
def test_a_graph_has_products_of_its_own_for_one_row(tmp_path, monkeypatch):
    import tensorflow as tf

    asked, model = [], scattered(language_model(tied=False))
    monkeypatch.setattr(products_module, "by_parts", lambda *x: asked.append(1) or by_parts(*x))
    generator = Generator(model)
    spec = {"token_ids": tf.TensorSpec((None, None), "int32")}
    module = tf.Module()
    module.variables_of_the_model = model.variables
    module.serve = tf.function(lambda inputs: generator.generate_tensors(inputs, 6), input_signature=[spec])
    tf.saved_model.save(module, str(tmp_path))
    assert asked
    loaded = tf.saved_model.load(str(tmp_path))
    prompts = np.array([[3, 4, 5, 6], [0, 9, 8, 7], [0, 0, 2, 9]], "int32")
    expected = Generator(model, jit_compile=False).generate(prompts, 6)
    for rows in (3, 1, 0):
        np.testing.assert_array_equal(loaded.serve({"token_ids": prompts[:rows]}), expected[:rows])


def test_they_pay_where_xla_compiles_for_one_cpu(monkeypatch):
    def pays(jit):
        found = []
        compiled(lambda x: found.append(StepProducts.pay(jit)) or x)(ops.ones(1))
        return found[-1]

    assert pays(jit=True) == (keras.backend.backend() != "torch")
    assert not pays(jit=False)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "several devices")
    assert not pays(jit=True)
