"""LLaVA and PaliGemma, held to what transformers computes and generates with the same checkpoint."""

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
TEXT = {**SIZES, "vocab_size": 99, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
IMAGE = {**SIZES, "hidden_size": 24, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-5}


def llava(text=None, image=None, **fields):
    text = {"model_type": "llama", **TEXT, **(text or {})}
    image = {"model_type": "clip_vision_model", **IMAGE, **(image or {})}
    count = 5 if fields.get("vision_feature_select_strategy") == "full" and "siglip" not in image["model_type"] else 4
    configuration = {"text_config": text, "vision_config": image, "image_seq_length": count, **fields}
    return "LlavaForConditionalGeneration", {"image_token_index": 98, **configuration}


def paligemma(text=None, image=None, **fields):
    text = {"model_type": "gemma", **TEXT, "num_key_value_heads": 1, "head_dim": 16, **(text or {})}
    image = {"model_type": "siglip_vision_model", **IMAGE, **(image or {})}
    configuration = {"text_config": text, "vision_config": image, "projection_dim": 32, **fields}
    return "PaliGemmaForConditionalGeneration", {"image_token_index": 98, **configuration}


GEMMA2 = {"model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 12}
SIGLIP = {"model_type": "siglip_vision_model"}
# name -> (architecture, configuration)
MODELS = {
    "llava": llava(),
    "llava, bare": ("LlavaModel", llava()[1]),
    "llava, mistral": llava({"model_type": "mistral", "sliding_window": 4}, vision_feature_select_strategy="full"),
    "llava, qwen2": llava({"model_type": "qwen2"}, SIGLIP, vision_feature_select_strategy="full"),
    "llava, layers": llava(vision_feature_layer=[-1, 1, 0], multimodal_projector_bias=False),
    "llava, tied": llava({"tie_word_embeddings": True}, projector_hidden_act="relu", tie_word_embeddings=True),
    "paligemma": paligemma(),
    "paligemma, bare": ("PaliGemmaModel", paligemma()[1]),
    "paligemma, no head": paligemma(image={"vision_use_head": False}),
    "paligemma, gemma2": paligemma(GEMMA2, tie_word_embeddings=False),
}


def batch_for(reference, rows=3):
    """Images and prompts, padded on the right, whose last tokens follow the prefix."""
    count = 5 if getattr(reference.config, "vision_feature_select_strategy", "") == "full" else 4
    count = 4 if reference.config.vision_config.model_type.startswith("siglip") else count
    random = np.random.default_rng(2)
    ids = np.concatenate(
        [random.integers(3, 98, (rows, 1)), np.full((rows, count), 98), random.integers(3, 98, (rows, 9 - count))], 1
    )
    real = np.arange(10) < np.array([10, 8, 7])[:rows, None]
    return {
        "images": random.normal(size=(rows, 16, 16, 3)).astype("float32"),
        "token_ids": np.where(real, ids, 0).astype("int32"),
        "padding_mask": real.astype("int32"),
        "segment_ids": np.broadcast_to(np.arange(10) > 6, ids.shape).astype("int32"),
    }


def feed(reference, batch):
    import torch

    names = {"token_ids": "input_ids", "padding_mask": "attention_mask", "segment_ids": "token_type_ids"}
    found = {theirs: torch.tensor(batch[ours]).long() for ours, theirs in names.items() if ours in batch}
    if "paligemma" not in reference.config.model_type:
        found.pop("token_type_ids", None)
    return {**found, "pixel_values": torch.tensor(batch["images"]).permute(0, 3, 1, 2)}


def expected(reference, batch):
    import torch

    with torch.no_grad():
        result = reference(**feed(reference, batch))
    return (result.logits if "logits" in result else result.last_hidden_state).numpy()


def outputs_of(model, batch):
    result = model({x.name: batch[x.name] for x in model.inputs})
    return keras.ops.convert_to_numpy(result["hidden_states"] if isinstance(result, dict) else result)


def difference(found, wanted, batch):
    """The largest difference at real tokens, in units of the largest value."""
    real = batch["padding_mask"] != 0
    return np.abs(found - wanted)[real].max() / np.abs(wanted[real]).max()


def load_quietly(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return kt.pretrained.load(directory)


def reload(reference, directory):
    with quiet():
        again, report = type(reference).from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.get(name) for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again.eval()


def shapes_of(directory):
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.shape(name) for name in checkpoint}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_what_is_saved_are_those_of_transformers(name, tmp_path):
    reference = make(*MODELS[name], tmp_path / "theirs")
    model = load_quietly(tmp_path / "theirs")
    batch = batch_for(reference)
    wanted = expected(reload(reference, tmp_path / "theirs"), batch)
    assert difference(outputs_of(model, batch), wanted, batch) <= 1e-5
    kt.pretrained.save(model, tmp_path / "ours")
    assert shapes_of(tmp_path / "ours") == shapes_of(tmp_path / "theirs")
    assert difference(expected(reload(reference, tmp_path / "ours"), batch), wanted, batch) <= 1e-6


FIELDS = {
    "llava": [
        {"vision_feature_layer": -1},
        {"vision_feature_layer": 1},
        {"projector_hidden_act": "relu"},
        {"text_config__rms_norm_eps": 0.1},
        {"text_config__hidden_act": "gelu"},
        {"text_config__rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
        {"vision_config__hidden_act": "relu"},
        {"vision_config__layer_norm_eps": 0.1},
        {"vision_config__num_attention_heads": 2},
    ],
    "paligemma": [
        {"text_config__hidden_act": "relu"},
        {"text_config__rms_norm_eps": 0.1},
        {"vision_config__hidden_act": "relu"},
        {"vision_config__layer_norm_eps": 0.1},
    ],
}


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_does_what_it_does_in_transformers(name, tmp_path):
    reference = make(*MODELS[name], tmp_path)
    batch = batch_for(reference)
    before = expected(reference, batch)
    written = json.loads((tmp_path / "config.json").read_text())
    for changes in FIELDS[name]:
        configuration = json.loads(json.dumps(written))
        for field, value in changes.items():
            *parts, field = field.split("__")
            (configuration[parts[0]] if parts else configuration)[field] = value
        (tmp_path / "config.json").write_text(json.dumps(configuration))
        wanted = expected(reload(reference, tmp_path), batch)
        assert difference(outputs_of(load_quietly(tmp_path), batch), wanted, batch) <= 1e-5, changes
        assert difference(wanted, before, batch) > 1e-3, changes


@pytest.mark.parametrize("name", ["llava", "llava, qwen2", "paligemma", "paligemma, gemma2"])
def test_every_field_is_accounted_for(name, tmp_path):
    everything = make(*MODELS[name], tmp_path).config.to_dict()
    family, fields = find_family(everything), Fields(everything, everything["model_type"])
    with keras.StatelessScope(initialize_variables=False):
        family.build(fields, "causal_lm", set())
    assert fields.unknown() == []


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_fields_that_are_left_out_have_the_defaults_of_transformers(name):
    """Released configurations leave out of the text what its class says anyway."""
    import torch
    import transformers

    architecture, configuration = MODELS[name]
    small = {"num_hidden_layers": 1, "model_type": configuration["text_config"]["model_type"]}
    image = {"model_type": configuration["vision_config"]["model_type"], "num_hidden_layers": 2, "hidden_size": 24}
    left = {"text_config": small, "vision_config": image, "model_type": name}
    kind = getattr(transformers, architecture)
    with torch.device("meta"), quiet():
        reference = kind(kind.config_class(**left, projection_dim=3072))
    fields = Fields({**left, "projection_dim": 3072}, name)
    with keras.StatelessScope(initialize_variables=False):
        model = find_family(left).build(fields, "causal_lm", set())
    assert model.input_shape[0][1:] == (224, 224, 3)
    sizes = {name: tuple(value.shape) for name, value in reference.named_parameters()}
    own = {weight.path: tuple(weight.shape) for weight in model.weights}
    assert (
        own["decoder_block_0/feed_forward/up/kernel"][::-1] == sizes["model.language_model.layers.0.mlp.up_proj.weight"]
    )
    assert own["embedding/embeddings"] == sizes["model.language_model.embed_tokens.weight"]
    assert (
        own["image_encoder_block_0/feed_forward/up/kernel"][::-1]
        == sizes["model.vision_tower.encoder.layers.0.mlp.fc1.weight"]
    )
    assert own["image_position/position_table"] == sizes["model.vision_tower.embeddings.position_embedding.weight"]


def ragged_prompts(reference):
    count = 5 if getattr(reference.config, "vision_feature_select_strategy", "") == "full" else 4
    return [[5] + [98] * count + [6, 7, 8, 9], [98] * count + [20, 21], [30] + [98] * count]


@pytest.mark.parametrize("name", ["llava", "llava, mistral", "paligemma", "paligemma, gemma2"])
@pytest.mark.parametrize("beams", [1, 4])
def test_generated_tokens_are_those_of_transformers(name, beams, tmp_path):
    import torch

    reference = reload(make(*MODELS[name], tmp_path), tmp_path)
    prompts = ragged_prompts(reference)
    length = max(map(len, prompts))
    padded = np.array([[0] * (length - len(row)) + row for row in prompts])
    images = np.random.default_rng(3).normal(size=(3, 16, 16, 3)).astype("float32")
    batch = {"images": images, "token_ids": padded, "padding_mask": padded != 0, "segment_ids": np.zeros_like(padded)}
    options = {"max_new_tokens": 16, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        wanted = reference.generate(**feed(reference, batch), **options)[:, length:].numpy()
    sampler = kt.generation.BeamSearch(4) if beams > 1 else "greedy"
    generator = kt.generation.Generator(kt.pretrained.load(tmp_path), sampler=sampler)
    np.testing.assert_array_equal(generator.generate({"images": images, "token_ids": prompts}, 16), wanted)


def test_a_prompt_that_has_begun_to_answer(tmp_path):
    """What follows the prefix is causal, whichever way the batch is given."""
    make(*MODELS["paligemma"], tmp_path)
    model = kt.pretrained.load(tmp_path)
    generator = kt.generation.Generator(model)
    images = np.random.default_rng(3).normal(size=(2, 16, 16, 3)).astype("float32")
    prompts = [[98] * 4 + [6, 7, 8], [98] * 4 + [6, 7]]
    segments = [[0] * 5 + [1, 1], [0] * 5 + [1]]
    found = generator.generate({"images": images, "token_ids": prompts, "segment_ids": segments}, 1)
    padded = np.array([row + [0] * (7 - len(row)) for row in prompts], "int32")
    inputs = {"images": images, "token_ids": padded, "padding_mask": (padded != 0).astype("int32")}
    inputs["segment_ids"] = np.array([row + [1] * (7 - len(row)) for row in segments], "int32")
    logits = keras.ops.convert_to_numpy(model(inputs))
    wanted = [logits[0, 6].argmax(), logits[1, 5].argmax()]
    assert found[:, 0].tolist() == wanted
    np.testing.assert_array_equal(generator.generate(inputs, 1), found)
    with pytest.raises(ValueError, match=r"`inputs\['segment_ids'\]` must have a number for each token.*\[7, 6\].*\[2"):
        generator.generate({"images": images, "token_ids": prompts, "segment_ids": [[0, 0], [0]]}, 1)


def test_an_image_that_does_not_fill_its_places(tmp_path):
    make(*MODELS["llava"], tmp_path)
    generator = kt.generation.Generator(kt.pretrained.load(tmp_path))
    images = np.zeros((2, 16, 16, 3), "float32")
    with pytest.raises(ValueError, match=r"the token 98 for each of the 4 vectors .* received \[4, 3\]"):
        generator.generate({"images": images, "token_ids": [[98] * 4, [98] * 3]}, 2)
    with pytest.raises(ValueError, match=r"the same number of rows each; received .*'images': 1"):
        generator.generate({"images": images[:1], "token_ids": [[98] * 4, [98] * 4]}, 2)


def in_memory(name):
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def test_names_of_files_on_the_hub_and_in_memory(tmp_path):
    reference = make(*MODELS["llava"], tmp_path / "new")
    tensors = {name: np.array(value) for name, value in Checkpoint(tmp_path / "new").items()}
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    spellings = {
        "hub": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
        "memory": in_memory,
    }
    batch = batch_for(reference)
    for kind, spell in spellings.items():
        write_checkpoint(tmp_path / kind, written, {spell(name): value for name, value in tensors.items()})
        model = load_quietly(tmp_path / kind)
        assert difference(outputs_of(model, batch), expected(reference, batch), batch) <= 1e-5
        kt.pretrained.save(model, tmp_path / f"{kind} again")
        assert shapes_of(tmp_path / f"{kind} again") == shapes_of(tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava", {"vision_feature_layer": -5}, r"`vision_feature_layer` .* from -4 to 3, .* received -5"),
        ("llava", {"vision_feature_layer": []}, r"`vision_feature_layer` .* received \[\]"),
        ("llava", {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy.*'cls'"),
        ("llava", {"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type.*pixtral"),
        ("llava", {"text_config": {"model_type": "bert"}}, "text_config.model_type.*decoder-only.*bert"),
        ("llava", {"text_config": None}, "must have `text_config`"),
        ("paligemma", {"projection_dim": 16}, "`projection_dim` of a paligemma .* must be 32 here; received 16"),
    ],
)
def test_values_without_an_implementation_are_refused_by_name(name, changes, message, tmp_path):
    make(*MODELS[name], tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, **changes}))
    with pytest.raises(ValueError, match=message):
        kt.pretrained.load(tmp_path)


def test_a_block_too_many_of_the_image_encoder_is_unexpected(tmp_path):
    make(*MODELS["llava"], tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["vision_config"]["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"unexpected: vision_tower.encoder.layers.2.layer_norm1.bias \(24,\)"):
        kt.pretrained.load(tmp_path)
