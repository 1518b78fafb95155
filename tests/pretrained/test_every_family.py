"""Whatever its family, a loaded model is like any other: it trains, is saved, exported, quantized and adapted."""

import gc
import json
import re

import keras
import numpy as np
import pytest
from reference_checkpoints import make

import keras_transformer as kt
from keras_transformer.pretrained.family import FAMILIES, find_family, find_task
from keras_transformer.pretrained.fields import Fields

TENSORFLOW = keras.backend.backend() == "tensorflow"

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BOTH = {"vocab_size": 40, "d_model": 16, **ENDS}
for side in ("encoder", "decoder"):
    BOTH |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
SEEN = {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4}

# `model_type` -> (architecture, configuration)
MODELS = {
    "bart": ("BartForConditionalGeneration", {**BOTH, "max_position_embeddings": 24}),
    "bert": ("BertForSequenceClassification", {**TEXT, "num_labels": 3}),
    "clip": ("CLIPModel", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 12}),
    "clip_text_model": ("CLIPTextModelWithProjection", {**TEXT, "projection_dim": 12}),
    "clip_vision_model": ("CLIPVisionModelWithProjection", {**IMAGE, "projection_dim": 12}),
    "deit": ("DeiTForImageClassification", {**IMAGE, "num_labels": 3}),
    "distilbert": (
        "DistilBertForTokenClassification",
        {"vocab_size": 40, "dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 24, "num_labels": 3},
    ),
    "gemma": ("GemmaForCausalLM", DECODER),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "sliding_window": 3}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 24, "bos_token_id": 1},
    ),
    "gpt_oss": ("GptOssForCausalLM", {**EXPERTS, "sliding_window": 3}),
    "llama": ("LlamaForCausalLM", DECODER),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **DECODER},
            "vision_config": {"model_type": "clip_vision_model", **IMAGE, **SEEN},
            "image_token_index": 39,
        },
    ),
    "marian": ("MarianMTModel", {**BOTH, "max_position_embeddings": 24}),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 3}),
    "mixtral": ("MixtralForCausalLM", {**EXPERTS, "output_router_logits": True}),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **DECODER},
            "vision_config": {"model_type": "siglip_vision_model", **IMAGE, **SEEN},
            "image_token_index": 39,
            "projection_dim": 16,
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", {**TEXT, "num_key_value_heads": 1}),
    "roberta": ("RobertaForMaskedLM", {**TEXT, "pad_token_id": 1, "type_vocab_size": 1}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    ),
    "vit": ("ViTForImageClassification", {**IMAGE, "num_labels": 3}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**BOTH, "num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 24},
    ),
}


def inputs_for(model, rows=3, length=10):
    """Inputs of a model by their names and shapes: rows end one after the other, and begin with an image if any."""
    random = np.random.default_rng(4)
    ids = random.integers(3, 39, (rows, length))
    if any(isinstance(layer, kt.layers.Placeholders) for layer in model.layers):
        ids[:, :4] = 39
    real = np.arange(length) < np.array([length, length - 2, length - 3])[:, None]
    values = {
        **dict.fromkeys(("token_ids", "source_ids", "target_ids"), ids * real),
        **dict.fromkeys(("padding_mask", "source_padding_mask"), real),
        "segment_ids": np.broadcast_to(np.arange(length) > 5, ids.shape),
    }
    found = {}
    for name, tensor in model.input.items():
        value = values[name] if name in values else random.normal(size=(rows, *tensor.shape[1:]))
        found[name] = value.astype(tensor.dtype)
    return found


def outputs_of(model, inputs):
    result = model(inputs)
    result = result if isinstance(result, dict) else {"output": result}
    return {name: keras.ops.convert_to_numpy(value) for name, value in result.items()}


def assert_close(found, wanted, tolerance):
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max(), name


def test_there_is_a_model_of_every_family():
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize("family", MODELS)
def test_a_loaded_model_is_like_any_other(family, tmp_path):
    reference = make(*MODELS[family], tmp_path / "checkpoint")
    all_fields_are_accounted_for(reference.config.to_dict(), tmp_path / "checkpoint")
    model = kt.pretrained.load(tmp_path / "checkpoint")
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)

    lines = []
    model.summary(line_length=200, print_fn=lines.append)
    assert re.search(r"(en|de)coder_block_0", "\n".join(map(str, lines)))

    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_close(outputs_of(again, inputs), before, 0 if TENSORFLOW else 1e-6)
    if TENSORFLOW:
        served_outputs_are_the_same(model, inputs, before, tmp_path / "saved_model")
    gc.freeze()  # Keras collects garbage for each layer that it quantizes, and would search all that is imported.
    again.quantize("int8")
    assert all(np.isfinite(value).all() for value in outputs_of(again, inputs).values())

    trains(model, inputs)
    trains_with_low_rank_adapters(model, inputs)


def all_fields_are_accounted_for(everything, directory):
    """Each attribute of the configuration's class is used, declared irrelevant or refused, in both kinds of files."""
    everything = {**everything, **json.loads((directory / "config.json").read_text())}
    family, fields = find_family(everything), Fields(everything, everything["model_type"])
    with keras.StatelessScope(initialize_variables=False):
        family.build(fields, find_task(family, everything), {"pooler.dense.weight"})
    assert fields.unknown() == []


def served_outputs_are_the_same(model, inputs, wanted, directory):
    import tensorflow as tf

    model.export(directory, verbose=False)
    loaded = tf.saved_model.load(directory)  # Which must live as long as its function.
    served = loaded.serve({name: tf.constant(value) for name, value in inputs.items()})
    served = served if isinstance(served, dict) else {"output": served}
    assert_close({name: value.numpy() for name, value in served.items()}, wanted, 1e-5)


def with_loss(model, run_eagerly=False):
    """The model compiled to tell rows, or the first of their tokens, apart; and labels."""
    output = model.output
    if isinstance(output, dict):
        names = ("logits_per_image", "image_embedding", "text_embedding")
        output = next(output[name] for name in names if name in output)
        model = keras.Model(model.input, output)
    shape = tuple(output.shape)
    labels = np.arange(3) % (shape[-1] or 3)
    labels = labels if len(shape) == 2 else np.broadcast_to(labels[:, None], (3, shape[1] or 10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3), loss, run_eagerly=run_eagerly)
    return model, labels


def trains(model, inputs):
    """One step lowers the loss."""
    model, labels = with_loss(model)
    before = float(model.loss(labels, model(inputs)))
    model.fit(inputs, labels, batch_size=3, epochs=1, verbose=0)
    assert float(model.loss(labels, model(inputs))) < before


def trains_with_low_rank_adapters(model, inputs):
    adapted = [layer for layer in model._flatten_layers() if layer.name in ("query", "value")]
    for layer in adapted:
        layer.enable_lora(2)
    kernels = [np.array(layer._kernel) for layer in adapted]
    model, labels = with_loss(model, run_eagerly=True)  # A step of the same layers was compiled before.
    model.fit(inputs, labels, batch_size=3, epochs=1, verbose=0)
    assert any(np.any(np.array(layer.lora_kernel_b)) for layer in adapted)
    for kernel, layer in zip(kernels, adapted, strict=True):
        np.testing.assert_array_equal(kernel, np.array(layer._kernel))
