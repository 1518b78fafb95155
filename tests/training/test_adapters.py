"""Adapters of low rank: they alone are trained, and merged they answer the same."""

import keras
import numpy as np
import pytest

import keras_transformer as kt
from keras_transformer.training import add_adapters, merge_adapters


def classifier():
    keras.utils.set_random_seed(1)
    return kt.models.text_classifier(30, 3, dim=8, depth=2, num_heads=2, hidden_dim=12, dropout=0.0)


@pytest.mark.parametrize("adapted, trained", [(("query", "value"), ()), (("up", "down", "output"), ("logits",))])
def test_only_adapters_and_new_layers_are_trained(adapted, trained):
    model, ids = classifier(), np.random.default_rng(0).integers(1, 30, (16, 7))
    before = {variable.path: np.array(keras.ops.convert_to_numpy(variable)) for variable in model.weights}
    add_adapters(model, 2, adapted, trained)
    names = {variable.path.split("/")[-1] for variable in model.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"} | ({"kernel", "bias"} if trained else set())
    assert len(model.trainable_variables) == 2 * 2 * len(adapted) + 2 * len(trained)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.fit(ids, ids[:, 0] % 3, epochs=2, verbose=0)
    for variable in model.weights:
        if variable.path in before and variable.path.split("/")[0] not in trained:
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), before[variable.path])
    merged = merge_adapters(model, classifier())
    assert not any("lora" in variable.path for variable in merged.weights)
    answers = [keras.ops.convert_to_numpy(x(ids)) for x in (model, merged, classifier())]
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-5)
    assert np.abs(answers[2] - answers[0]).max() > 1e-4


def test_bad_arguments():
    with pytest.raises(ValueError, match="`rank` must be a positive integer; received rank=0"):
        add_adapters(classifier(), 0)
    with pytest.raises(ValueError, match="`adapted` must name layers of the model; none is named qkv"):
        add_adapters(classifier(), 2, ["qkv"])
    with pytest.raises(ValueError, match=r"`trained` must name layers of the model with weights, .* \['embeding'\]"):
        add_adapters(classifier(), 2, trained=["embeding", "logits"])
