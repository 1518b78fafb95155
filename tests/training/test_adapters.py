"""Adapters of low rank: they alone are trained, and merged they answer the same."""

import keras
import numpy as np
import pytest

import keras_transformer as kt
from keras_transformer.training import add_adapters, load_adapters, merge_adapters, save_adapters


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


def test_a_pattern_chooses_and_few_weights_are_trained():
    model = kt.models.causal_lm(400, dim=256, depth=2, num_heads=4, hidden_dim=1024)
    add_adapters(model, 8, r"decoder_block_1/self_attention/(query|value)$")
    paths = [variable.path for variable in model.trainable_variables]
    adapters = ("lora_kernel_a", "lora_kernel_b")
    assert paths == [f"decoder_block_1/self_attention/{x}/{name}" for x in ("query", "value") for name in adapters]
    assert sum(np.prod(variable.shape) for variable in model.trainable_variables) < 0.01 * model.count_params()


def test_adapters_are_saved_apart(tmp_path):
    model, ids = classifier(), np.random.default_rng(0).integers(1, 30, (16, 7))
    add_adapters(model, 2, trained=("logits",))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.fit(ids, ids[:, 0] % 3, epochs=2, verbose=0)
    save_adapters(model, tmp_path / "adapters.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters.npz"]
    again = classifier()
    add_adapters(again, 2, trained=("logits",))
    assert np.abs(answer(again, ids) - answer(model, ids)).max() > 1e-4
    load_adapters(again, tmp_path / "adapters.npz")
    np.testing.assert_array_equal(answer(again, ids), answer(model, ids))


def answer(model, ids):
    return keras.ops.convert_to_numpy(model(ids))


def test_a_file_of_other_adapters_is_refused(tmp_path):
    model, other = classifier(), classifier()
    add_adapters(model, 2)
    save_adapters(model, tmp_path / "adapters.npz")
    add_adapters(other, 3)
    before = [keras.ops.convert_to_numpy(variable) for variable in other.trainable_variables]
    with pytest.raises(ValueError, match=r"down/lora_kernel_a has the shape \(12, 2\) in the file and \(12, 3\) in"):
        load_adapters(other, tmp_path / "adapters.npz")
    for variable, value in zip(other.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    with pytest.raises(ValueError, match="`model` must have adapters, which `add_adapters` gives it"):
        save_adapters(classifier(), tmp_path / "none.npz")


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_model_is_adapted(mode):
    model, ids = classifier(), np.random.default_rng(0).integers(1, 30, (4, 7))
    model.quantize(mode)
    before = answer(model, ids)
    add_adapters(model, 2)
    np.testing.assert_allclose(answer(model, ids), before, atol=1e-6)
    assert all("lora_kernel" in variable.path for variable in model.trainable_variables)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`rank` must be a positive integer; received rank=0"):
        add_adapters(classifier(), 0)
    with pytest.raises(
        ValueError, match=r"must name layers of a projection .* \['qkv'\], and there are .*key, .*query"
    ):
        add_adapters(classifier(), 2, ["qkv"])
    with pytest.raises(ValueError, match="'keys', and there are .*encoder_block_0/self_attention/query"):
        add_adapters(classifier(), 2, "keys")
    adapted = classifier()
    add_adapters(adapted, 2)
    with pytest.raises(ValueError, match="has adapters already, as in `encoder_block_0/"):
        add_adapters(adapted, 2)
    with pytest.raises(ValueError, match=r"`trained` must name layers of the model with weights, .* \['embeding'\]"):
        add_adapters(classifier(), 2, trained=["embeding", "logits"])
