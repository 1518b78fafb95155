"""Products in another order than the layers', and what they are the same as."""

import keras
import numpy as np
import pytest
from harness import as_numpy, compiled, random
from keras import ops

import keras_transformer as kt
from keras_transformer.generation import Generator
from keras_transformer.generation.graph import DecodingGraph
from keras_transformer.generation.products import StepProducts


class Spy(keras.layers.Dense):
    """Says that it was called."""

    def call(self, *_, **__):
        raise RuntimeError("called")


def language_model(tied):
    return kt.models.causal_lm(30, dim=16, depth=2, num_heads=2, dropout=0.0, tied_output=tied)


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


@pytest.mark.parametrize("mode, rows", [("int8", 2), ("int4", 1)])
def test_a_row_by_a_quantized_layer(products, mode, rows, monkeypatch):
    layer, x = keras.layers.Dense(12, activation="gelu", bias_initializer="normal"), random(1, 1, 16)
    layer.build((1, 1, 16))
    layer.quantize(mode)
    expected, seen, call = as_numpy(layer(x)), [], layer.quantized_call
    monkeypatch.setattr(layer, "quantized_call", lambda x, **options: seen.append(x.shape[1]) or call(x, **options))
    np.testing.assert_allclose(as_numpy(products.dense(layer, ops.convert_to_tensor(x))), expected, atol=1e-6)
    assert seen == [rows] and np.abs(expected).max() > 0.1


def test_a_row_by_a_quantized_tied_output():
    model, x = language_model(tied=True), random(1, 1, 16)
    model.quantize("int8")
    embedding = model.get_layer("embedding")
    found = StepProducts(DecodingGraph(model)).tied_output(embedding, ops.convert_to_tensor(x))
    np.testing.assert_allclose(as_numpy(found), as_numpy(embedding(x, reverse=True)), atol=1e-6)


@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_tied_output_is_that_of_the_embedding(rows, soft_cap):
    model = language_model(tied=True)
    embedding, x = model.get_layer("embedding"), random(rows, 1, 16)
    embedding.logit_soft_cap = soft_cap
    found = StepProducts(DecodingGraph(model)).tied_output(embedding, ops.convert_to_tensor(x))
    np.testing.assert_allclose(as_numpy(found), as_numpy(embedding(x, reverse=True)), atol=1e-5)
    assert StepProducts(DecodingGraph(language_model(tied=True))).tied_output(embedding, x) is None


@pytest.mark.compiled
@pytest.mark.parametrize(
    "tied, sampler, mode",
    [(True, "greedy", None), (True, "beam_search", None), (False, "beam_search", None), (False, "greedy", "int8")],
)
def test_one_row_compiled_goes_on_as_in_a_batch_that_is_not(tied, sampler, mode):
    model = language_model(tied)
    for seed, weight in enumerate(model.weights):
        weight.assign(random(*weight.shape, seed=seed, scale=0.5) if len(weight.shape) == 2 else weight)
    if mode is not None:
        model.quantize(mode)
    prompts = np.array([[3, 4, 5, 6], [0, 9, 8, 7]], "int32")
    expected = Generator(model, sampler=sampler, jit_compile=False).generate(prompts, 6)
    assert tied or len(np.unique(expected)) > 1  # A tied output mostly repeats the token that goes in.
    generator = Generator(model, sampler=sampler)
    for row in range(2):
        np.testing.assert_array_equal(generator.generate(prompts[row : row + 1], 6), expected[row : row + 1])


def test_they_pay_where_xla_compiles_for_one_cpu(monkeypatch):
    def pays(jit):
        found = []
        compiled(lambda x: found.append(StepProducts.pay(jit)) or x)(ops.ones(1))
        return found[-1]

    assert pays(jit=True) == (keras.backend.backend() != "torch")
    assert not pays(jit=False)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "several devices")
    assert not pays(jit=True)
