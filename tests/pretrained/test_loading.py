"""Loading and saving: what is asked for, what is refused, and what a loaded model can do."""

import json
import re

import keras
import numpy as np
import pytest
from reference_checkpoints import TEXT_MODELS, assert_close, expected, make, outputs_of, text_batch

import keras_transformer as kt
from keras_transformer.pretrained.checkpoint import Checkpoint, write_checkpoint


@pytest.fixture
def tiny(tmp_path):
    """Makes a checkpoint, and returns its directory and the model of transformers."""

    def written(name="gpt2"):
        return tmp_path / "checkpoint", make(*TEXT_MODELS[name], tmp_path / "checkpoint")

    return written


def rewrite(directory, change):
    """Writes the checkpoint anew with tensors and configuration that `change` has altered in place."""
    configuration = json.loads((directory / "config.json").read_text())
    with Checkpoint(directory) as checkpoint:
        tensors = {name: np.array(checkpoint[name]) for name in checkpoint}
    change(tensors, configuration)
    write_checkpoint(directory, configuration, tensors)


def test_all_that_is_wrong_with_the_tensors_is_listed_at_once(tiny):
    directory, _ = tiny()

    def change(tensors, configuration):
        del tensors["transformer.h.0.ln_1.weight"]
        tensors["transformer.h.7.ln_1.weight"] = np.ones(32, "float32")
        tensors["strange"] = np.ones((2, 3), "float32")
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:5]

    rewrite(directory, change)
    with pytest.raises(ValueError) as error:
        kt.pretrained.load(directory)
    for line in (
        r"missing: h\.0\.ln_1\.weight \(32,\)",
        r"unexpected: strange \(2, 3\)",
        r"unexpected: transformer\.h\.7\.ln_1\.weight \(32,\)",
        r"wrong shape: transformer\.wpe\.weight \(5, 32\), where \(40, 32\) is expected",
    ):
        assert re.search(line, str(error.value)), line


def test_head_of_another_task_is_left_away_with_a_word(tiny, tmp_path):
    directory, reference = tiny("bert, masked")
    with pytest.warns(UserWarning, match=r"cls\.predictions\.bias"):
        model = kt.pretrained.load(directory, task="bare")
    batch = text_batch(reference, "none")
    wanted = expected(reference.bert, batch)
    assert_close(outputs_of(model, batch), wanted, np.ones((3, 11), bool))
    kt.pretrained.save(model, tmp_path / "bare")
    again = type(reference.bert).from_pretrained(tmp_path / "bare", add_pooling_layer=False).eval()
    assert_close(expected(again, batch), wanted, np.ones((3, 11), bool), 1e-6)
    with pytest.raises(ValueError, match="`task` must be one of .*'bare'.*received 'causal_lm'"):
        kt.pretrained.load(directory, task="causal_lm")


@pytest.mark.filterwarnings("ignore:These weights")
@pytest.mark.parametrize("name", ["bert, masked", "bert, sequence", "distilbert, masked", "roberta, masked"])
def test_new_head(name, tiny, tmp_path):
    """The body is read, the head is new, and what is saved has the names of the classes."""
    directory, reference = tiny(name)
    batch = text_batch(reference, "none")
    labels = ["good", "bad", "neither", "both"]
    model = kt.pretrained.load(directory, task="sequence_classification", labels=labels)
    body = kt.pretrained.load(directory, task="bare")
    paths = {variable.path: variable for variable in model.variables}
    for variable in body.variables:
        if "seed_generator" not in variable.path:
            np.testing.assert_array_equal(np.array(paths[variable.path]), np.array(variable))
    logits = outputs_of(model, batch)["logits"]
    assert logits.shape == (3, 4) and np.abs(logits).max() > 0
    kt.pretrained.save(model, tmp_path / "tuned")
    again = kt.pretrained.load(tmp_path / "tuned")
    np.testing.assert_array_equal(outputs_of(again, batch)["logits"], logits)
    written = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert written["id2label"] == {str(i): label for i, label in enumerate(labels)}


@pytest.mark.parametrize(
    "task, labels, message",
    [
        ("bare", ["a", "b"], "`labels` are for a `task` that classifies"),
        ("sequence_classification", ["a", "a"], "two names or more, each of them once"),
        ("sequence_classification", ["a"], "two names or more"),
    ],
)
def test_new_head_needs_names(task, labels, message, tiny):
    with pytest.raises(ValueError, match=message):
        kt.pretrained.load(tiny("bert, masked")[0], task=task, labels=labels)


def test_names_without_prefix_buffers_and_earlier_spellings(tiny):
    directory, reference = tiny("bert")

    def change(tensors, configuration):
        for name in list(tensors):
            value = tensors.pop(name)
            name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name))
            tensors["bert." + name] = value
        tensors["bert.embeddings.position_ids"] = np.arange(40)[None]

    rewrite(directory, change)
    batch = text_batch(reference, "none")
    assert_close(outputs_of(kt.pretrained.load(directory), batch), expected(reference, batch), np.ones((3, 11), bool))


def test_tied_tensor_in_the_file_must_say_the_same(tiny):
    directory, reference = tiny()
    embedding = "transformer.wte.weight"
    rewrite(directory, lambda tensors, _: tensors.update({"lm_head.weight": tensors[embedding]}))
    kt.pretrained.load(directory)
    rewrite(directory, lambda tensors, _: tensors.update({"lm_head.weight": tensors[embedding] + 1}))
    with pytest.raises(ValueError, match="tie_word_embeddings.*lm_head.weight"):
        kt.pretrained.load(directory)


def test_values_that_are_not_finite_are_warned_of(tiny):
    directory, _ = tiny()
    rewrite(directory, lambda tensors, _: tensors["transformer.ln_f.bias"].__setitem__(0, np.nan))
    with pytest.warns(UserWarning, match=r"transformer\.ln_f\.bias .* not finite"):
        kt.pretrained.load(directory)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mystery"}, r"`model_type` must be one of .*'bert', .*received 'mystery'"),
        ({"architectures": ["GPT2ForTokens"]}, r"`architectures` .* must name one of .*GPT2LMHeadModel.*GPT2ForTokens"),
    ],
)
def test_unknown_kinds_of_models(values, message, tiny):
    directory, _ = tiny()
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**written, **values}))
    with pytest.raises(ValueError, match=message):
        kt.pretrained.load(directory)


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        kt.pretrained.load(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_dtype(dtype, tiny):
    directory, reference = tiny()
    model = kt.pretrained.load(directory, dtype=dtype)
    policy = keras.DTypePolicy(dtype)
    assert {keras.backend.standardize_dtype(w.dtype) for w in model.weights} == {policy.variable_dtype}
    assert keras.config.dtype_policy().name == "float32"
    batch = text_batch(reference, "none")
    found = {name: value.astype("float32") for name, value in outputs_of(model, batch).items()}
    assert_close(found, expected(reference, batch), np.ones((3, 11), bool), tolerance=0.05)


def test_saving_refuses_another_model_and_what_it_does_not_know(tiny, tmp_path):
    directory, _ = tiny()
    model = kt.pretrained.load(directory)
    make(*TEXT_MODELS["llama"], tmp_path / "other")
    before = (tmp_path / "other" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="model_type"):
        kt.pretrained.save(model, tmp_path / "other")
    assert (tmp_path / "other" / "config.json").read_bytes() == before
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="`configuration` must be given"):
        kt.pretrained.save(reloaded, tmp_path / "new")
    kt.pretrained.save(reloaded, tmp_path / "new", json.loads((directory / "config.json").read_text()))
    with Checkpoint(directory) as theirs, Checkpoint(tmp_path / "new") as ours:
        assert set(theirs) == set(ours)
        for name in theirs:
            np.testing.assert_array_equal(theirs[name], ours[name])


def test_what_low_rank_adapters_add_has_no_place_in_a_checkpoint(tiny, tmp_path):
    directory, _ = tiny("bert, sequence")
    model = kt.pretrained.load(directory)
    for layer in model._flatten_layers():
        if layer.name == "query":
            layer.enable_lora(2)
    with pytest.raises(ValueError, match="lora.*has no place there"):
        kt.pretrained.save(model, tmp_path / "with_lora")
    assert not (tmp_path / "with_lora").exists()


def test_generation_settings_go_along(tiny, tmp_path):
    directory, reference = tiny()
    settings = {**json.loads((directory / "generation_config.json").read_text()), "suppress_tokens": [5], "top_k": 7}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    kt.pretrained.save(kt.pretrained.load(directory), tmp_path / "ours")
    again = type(reference).from_pretrained(tmp_path / "ours").generation_config
    assert (again.suppress_tokens, again.top_k, again.eos_token_id) == ([5], 7, 1)


def test_trained_weights_are_saved(tiny, tmp_path):
    directory, _ = tiny("bert, sequence")
    model = kt.pretrained.load(directory)
    kernel = next(w for w in model.weights if w.path == "encoder_block_1/feed_forward/up/kernel")
    kernel.assign(keras.ops.ones_like(kernel) * 3)
    kt.pretrained.save(model, tmp_path / "trained")
    with Checkpoint(tmp_path / "trained") as saved:
        assert (saved["bert.encoder.layer.1.intermediate.dense.weight"] == 3).all()
