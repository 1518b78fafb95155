"""ViT, DeiT and CLIP, held to what transformers computes with the same checkpoint."""

import json
import warnings

import keras
import numpy as np
import pytest
from reference_checkpoints import make, quiet

import keras_transformer as kt
from keras_transformer.pretrained.checkpoint import Checkpoint, write_checkpoint
from keras_transformer.pretrained.family import find_family
from keras_transformer.pretrained.fields import Fields

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
# What transformers allows besides squares that divide squares: pairs, and images that patches do not fill.
OBLONG = {**SIZES, "image_size": [24, 18], "patch_size": [8, 4], "num_channels": 2, "qkv_bias": False}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 12, "projection_dim": 20, "eos_token_id": 7}
VISION = {**SIZES, "hidden_size": 24, "image_size": 17, "patch_size": 4, "projection_dim": 20}
CLIP = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 20}

# name -> (architecture, configuration)
MODELS = {
    "vit": ("ViTModel", IMAGE),
    "vit, oblong": ("ViTModel", {**OBLONG, "pooler_output_size": 12}),
    "vit, labels": ("ViTForImageClassification", {**IMAGE, "num_labels": 3}),
    "deit": ("DeiTModel", IMAGE),
    "deit, labels": ("DeiTForImageClassification", {**OBLONG, "num_labels": 3}),
    "deit, teacher": ("DeiTForImageClassificationWithTeacher", {**IMAGE, "num_labels": 3}),
    "clip": ("CLIPModel", CLIP),
    "clip, text": ("CLIPTextModel", TEXT),
    "clip, text, projected": ("CLIPTextModelWithProjection", TEXT),
    "clip, image": ("CLIPVisionModel", VISION),
    "clip, image, projected": ("CLIPVisionModelWithProjection", VISION),
}

# Texts that end at the first 7, or, where that is how ends are found, at the first of the largest number.
TOKENS = np.array(
    [[11, 30, 98, 12, 98, 7, 25, 7, 60], [40, 41, 7, 13, 90, 7, 7, 7, 7], [21, 50, 22, 0, 0, 0, 0, 0, 0]], "int32"
)
LENGTHS = np.array([9, 6, 3])


def batch_for(model):
    """Four images and three texts padded on the right, as far as `model` takes them."""
    found = {"token_ids": TOKENS, "padding_mask": (np.arange(9) < LENGTHS[:, None]).astype("int32")}
    for tensor in model.inputs:
        if tensor.name == "images":
            found["images"] = np.random.default_rng(1).normal(size=(4, *tensor.shape[1:])).astype("float32")
    return {tensor.name: found[tensor.name] for tensor in model.inputs}


def outputs_of(model, batch):
    result = model(batch)
    result = result if isinstance(result, dict) else {"logits": result}
    return {name: real(keras.ops.convert_to_numpy(value), name, batch) for name, value in result.items()}


def expected(model, batch, **options):
    import torch

    names = {"token_ids": "input_ids", "padding_mask": "attention_mask", "images": "pixel_values"}
    feed = {names[name]: torch.tensor(value) for name, value in batch.items()}
    if "images" in batch:
        feed["pixel_values"] = feed["pixel_values"].permute(0, 3, 1, 2)
    with torch.no_grad():
        result = model(**feed, **options)
    spellings = {
        "logits": "logits",
        "hidden_states": "last_hidden_state",
        "pooled": "pooler_output",
        "logits_per_image": "logits_per_image",
        "image_embedding": "image_embeds",
        "text_embedding": "text_embeds",
    }
    values = {ours: result.get(theirs) for ours, theirs in spellings.items()}
    return {name: real(value.numpy(), name, batch) for name, value in values.items() if value is not None}


def real(value, name, batch):
    """A result without what stands at padding, which means nothing."""
    return value[batch["padding_mask"] != 0] if name == "hidden_states" and "padding_mask" in batch else value


def difference(found, wanted):
    """The largest difference, in units of the largest value."""
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in wanted.items()}
    return max(np.abs(found[name] - value).max() / np.abs(value).max() for name, value in wanted.items())


def load_quietly(directory, **options):
    """Loads a checkpoint none of whose fields or weights is a surprise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return kt.pretrained.load(directory, **options)


def shapes_of(directory):
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.shape(name) for name in checkpoint}


def reload(kind, directory):
    with quiet():
        model, report = kind.from_pretrained(directory, output_loading_info=True)
    assert not any(report.get(name) for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def change(source, directory, **changes):
    """A checkpoint of the same weights whose configuration has other fields: `text_config__hidden_act` is nested."""
    configuration = json.loads((source / "config.json").read_text())
    for name, value in changes.items():
        *parts, field = name.split("__")
        (configuration[parts[0]] if parts else configuration)[field] = value
    checkpoint = Checkpoint(source)
    write_checkpoint(directory, configuration, {name: checkpoint[name] for name in checkpoint})
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_what_is_saved_are_those_of_transformers(name, tmp_path):
    reference = make(*MODELS[name], tmp_path / "theirs")
    model = load_quietly(tmp_path / "theirs")
    batch = batch_for(model)
    wanted = expected(reference, batch)
    assert difference(outputs_of(model, batch), wanted) <= 1e-5
    kt.pretrained.save(model, tmp_path / "ours")
    assert shapes_of(tmp_path / "ours") == shapes_of(tmp_path / "theirs")
    assert difference(expected(reload(type(reference), tmp_path / "ours"), batch), wanted) <= 1e-6


FIELDS = {
    "vit": [
        {"hidden_act": "relu"},
        {"layer_norm_eps": 0.01},
        {"pooler_act": "sigmoid"},
        {"num_attention_heads": 2},
    ],
    "clip": [
        {"text_config__eos_token_id": 2},
        {"text_config__eos_token_id": 30},
        {"text_config__hidden_act": "gelu"},
        {"text_config__layer_norm_eps": 0.01},
        {"vision_config__hidden_act": "gelu"},
        {"vision_config__layer_norm_eps": 0.01},
        {"vision_config__num_attention_heads": 2},
        # Of fields that stand there twice the second ones count, as do the defaults of those that the second leave out.
        {"text_config_dict": {**TEXT, "num_attention_heads": 2}},
        {"vision_config_dict": {**VISION, "hidden_act": "gelu_new"}},
    ],
}


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_does_what_it_does_in_transformers(name, tmp_path):
    reference = make(*MODELS[name], tmp_path / "theirs")
    model = load_quietly(tmp_path / "theirs")
    batch = batch_for(model)
    before = outputs_of(model, batch)
    for i, changes in enumerate(FIELDS[name]):
        directory = change(tmp_path / "theirs", tmp_path / str(i), **changes)
        found = outputs_of(kt.pretrained.load(directory), batch)
        with quiet():
            wanted = expected(type(reference).from_pretrained(directory).eval(), batch)
        assert difference(found, wanted) <= 1e-5, changes
        assert difference(found, before) > 1e-3, changes


@pytest.mark.parametrize(
    ("architecture", "configuration"),
    [
        ("ViTModel", {"model_type": "vit"}),
        ("DeiTModel", {"model_type": "deit"}),
        ("CLIPModel", {"model_type": "clip", "text_config": {}, "vision_config": {}}),
    ],
)
def test_fields_that_are_left_out_have_the_defaults_of_transformers(architecture, configuration):
    import torch
    import transformers

    kind = getattr(transformers, architecture)
    with torch.device("meta"), quiet():
        reference = kind(kind.config_class(**configuration))
    fields = Fields(configuration, configuration["model_type"])
    with keras.StatelessScope(initialize_variables=False):
        model = find_family(configuration).build(fields, "bare", {"pooler.dense.weight"})
    assert model.count_params() == sum(parameter.numel() for parameter in reference.parameters())
    blocks = [layer for layer in model.layers if isinstance(layer, kt.layers.EncoderBlock)]
    found = {(b.self_attention.num_heads, b.feed_forward_norm.epsilon, activation_of(b)) for b in blocks}
    parts = [reference.config] if "text_config" not in configuration else reference.config.sub_configs
    parts = [getattr(reference.config, part) if isinstance(part, str) else part for part in parts]
    assert found == {(part.num_attention_heads, part.layer_norm_eps, part.hidden_act) for part in parts}
    assert len(blocks) == sum(part.num_hidden_layers for part in parts)


def activation_of(block):
    return block.feed_forward.activation.__name__


def test_a_head_is_left_away(tmp_path):
    reference = make(*MODELS["vit, labels"], tmp_path)
    with pytest.warns(UserWarning, match="are left away: .*classifier.bias"):
        model = kt.pretrained.load(tmp_path, task="bare")
    batch = batch_for(model)
    assert difference(outputs_of(model, batch), expected(reference.vit, batch)) <= 1e-5


def test_the_head_that_restores_masked_images_is_left_away(tmp_path):
    reference = make("DeiTForMaskedImageModeling", {**IMAGE, "encoder_stride": 8}, tmp_path)
    with pytest.warns(UserWarning, match="are left away: .*decoder.0.weight.*embeddings.mask_token"):
        model = kt.pretrained.load(tmp_path, task="bare")
    batch = batch_for(model)
    assert difference(outputs_of(model, batch), expected(reference.deit, batch)) <= 1e-5
    with pytest.raises(ValueError, match="must name one of .*DeiTForImageClassification"):
        kt.pretrained.load(tmp_path)


def test_other_spellings_of_files(tmp_path):
    reference = make(*MODELS["vit, labels"], tmp_path / "original")
    with quiet():
        reference.save_pretrained(tmp_path / "in memory", save_original_format=False)
    assert not set(shapes_of(tmp_path / "in memory")) & {"vit.encoder.layer.0.output.dense.weight"}
    models = [load_quietly(tmp_path / name) for name in ("original", "in memory")]
    for value, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize(("name", "prefix"), [("clip, text", "text_model."), ("clip, image", "vision_model.")])
def test_an_older_file_of_one_encoder_has_the_names_of_the_larger_model(name, prefix, tmp_path):
    make(*MODELS[name], tmp_path / "theirs")
    checkpoint = Checkpoint(tmp_path / "theirs")
    tensors = {prefix + name: checkpoint[name] for name in checkpoint}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(12)[None]
    write_checkpoint(tmp_path / "older", json.loads((tmp_path / "theirs" / "config.json").read_text()), tensors)
    models = [load_quietly(tmp_path / name) for name in ("theirs", "older")]
    for value, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(value, other)


def test_an_older_configuration_lists_much_that_does_not_matter(tmp_path):
    make(*MODELS["clip"], tmp_path / "theirs")
    fields = {
        "add_cross_attention": False,
        "cross_attention_hidden_size": None,
        "decoder_start_token_id": None,
        "dropout": 0.0,
        "is_decoder": False,
        "num_beams": 1,
        "pruned_heads": {},
        "tie_word_embeddings": True,
        "torch_dtype": None,
    }
    changes = {f"{part}__{name}": value for part in ("text_config", "vision_config") for name, value in fields.items()}
    directory = change(
        tmp_path / "theirs", tmp_path / "older", text_config_dict=None, vision_config_dict=None, **changes
    )
    load_quietly(directory)
    with pytest.warns(UserWarning, match=r"unknown here.*\['text_config.window'\]"):
        kt.pretrained.load(change(tmp_path / "theirs", tmp_path / "newer", text_config__window=3))


def test_the_end_of_a_text_is_one_number(tmp_path):
    make(*MODELS["clip, text"], tmp_path / "theirs")
    directory = change(tmp_path / "theirs", tmp_path / "other", eos_token_id=[7, 8])
    with pytest.raises(ValueError, match=r"`eos_token_id` of a clip_text_model .* one number here; received \[7, 8\]"):
        kt.pretrained.load(directory)


def test_a_classifier_trains_and_a_keras_file_holds_all_of_it(tmp_path):
    make(*MODELS["deit, teacher"], tmp_path)
    model = load_quietly(tmp_path)
    images, labels = batch_for(model), np.array([0, 2, 1, 2])
    model.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.evaluate(images, labels, verbose=0)
    model.fit(images, labels, batch_size=4, epochs=1, verbose=0)
    assert model.evaluate(images, labels, verbose=0) < before
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_same(model, again, images)


def test_images_and_texts_are_counted_apart_and_a_keras_file_holds_both(tmp_path):
    make(*MODELS["clip"], tmp_path)
    model = load_quietly(tmp_path)
    batch = batch_for(model)
    found = model(batch)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "logits_per_image": (4, 3),
        "image_embedding": (4, 20),
        "text_embedding": (3, 20),
    }
    for name in ("image_embedding", "text_embedding"):
        lengths = np.linalg.norm(keras.ops.convert_to_numpy(found[name]), axis=-1)
        np.testing.assert_allclose(lengths, 1, atol=1e-5)
    model.save(tmp_path / "model.keras")
    assert_same(model, keras.models.load_model(tmp_path / "model.keras"), batch)


def assert_same(model, other, batch):
    """Holds weights to equality, and outputs to rounding: torch multiplies by a transposed array in another order."""
    for value, own in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(value, own)
    assert difference(outputs_of(other, batch), outputs_of(model, batch)) <= 1e-6


@pytest.mark.parametrize("name", ["vit", "vit, labels", "deit", "deit, teacher"])
def test_images_of_another_size_are_seen_as_transformers_sees_them(name, tmp_path):
    reference = make(*MODELS[name], tmp_path)
    model = kt.models.resize_positions(load_quietly(tmp_path), (40, 24))
    batch = batch_for(model)
    wanted = expected(reference, batch, interpolate_pos_encoding=True)
    assert difference(outputs_of(model, batch), wanted) <= 1e-5


def test_images_that_are_cut_keep_their_size(tmp_path):
    make(*MODELS["clip, image"], tmp_path)
    with pytest.raises(ValueError, match=r"from \(16, 16\) of the \(17, 17\) pixels"):
        kt.models.resize_positions(load_quietly(tmp_path), (40, 24))
