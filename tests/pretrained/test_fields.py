"""No field of a configuration is overlooked: each is used, known not to matter, or refused."""

import json
import warnings

import keras
import numpy as np
import pytest
from reference_checkpoints import TEXT_MODELS, assert_close, expected, make, outputs_of, quiet, text_batch

import keras_transformer as kt
from keras_transformer.pretrained.family import find_family, find_task
from keras_transformer.pretrained.fields import Fields

ROPE = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
# (model, what its configuration says otherwise)
CHANGES = [
    ("bert", {"hidden_act": "relu"}),
    ("bert", {"hidden_act": "gelu_new"}),
    ("bert", {"layer_norm_eps": 0.1}),
    ("bert", {"type_vocab_size": 3}),
    ("bert, masked", {"hidden_act": "silu"}),
    ("roberta", {"layer_norm_eps": 0.1}),
    ("roberta", {"pad_token_id": 3}),
    ("roberta", {"type_vocab_size": 2}),
    ("distilbert", {"activation": "relu"}),
    ("distilbert", {"sinusoidal_pos_embds": True}),
    ("gpt2", {"n_inner": 48}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"layer_norm_epsilon": 0.1}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"reorder_and_upcast_attn": True}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"head_dim": 16}),
    ("llama", {"num_key_value_heads": None}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rms_norm_eps": 0.1}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", **ROPE}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "beta_fast": 16.0, "attention_factor": 1.3, **ROPE}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention"] * 2}),
    ("gemma", {"hidden_act": "gelu"}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),
    ("gemma", {"hidden_act": "silu"}),
    ("gemma", {"attention_bias": True}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gemma2", {"query_pre_attn_scalar": 100}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"attn_logit_softcapping": 2.0}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("gemma2", {"hidden_activation": "silu"}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
]


def describe(change):
    name, values = change
    return f"{name}-{json.dumps(values)}"


@pytest.mark.parametrize("change", CHANGES, ids=describe)
def test_fields_that_change_the_computation(change, tmp_path):
    name, values = change
    architecture, configuration = TEXT_MODELS[name]
    reference = make(architecture, {**configuration, **values}, tmp_path)
    # What stands in a file may mean something else to the class, which writes what it means.
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, **values}))
    with quiet():
        reference = type(reference).from_pretrained(tmp_path).eval()
    batch = text_batch(reference, "none", rows=2)
    assert_close(outputs_of(kt.pretrained.load(tmp_path), batch), expected(reference, batch), np.ones((2, 11), bool))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_earlier_spelling_of_rotary_positions(name, tmp_path):
    """`rope_theta` and `rope_scaling` of version 4 mean what `rope_parameters` of version 5 does."""
    architecture, configuration = TEXT_MODELS[name]
    rope = {"rope_type": "linear", "factor": 4.0}
    reference = make(architecture, {**configuration, "rope_parameters": {**rope, "rope_theta": 500.0}}, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["rope_parameters"]
    batch = text_batch(reference, "none")
    for kind in ("rope_type", "type"):
        earlier = {**written, "rope_theta": 500.0, "rope_scaling": {kind: "linear", "factor": 4.0}}
        (tmp_path / "config.json").write_text(json.dumps(earlier))
        model = kt.pretrained.load(tmp_path)
        assert_close(outputs_of(model, batch), expected(reference, batch), np.ones((3, 11), bool))


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_every_field_of_the_configuration_class_is_accounted_for(name, tmp_path):
    """Also where a configuration says all, not only what differs from the defaults of its class."""
    reference = make(*TEXT_MODELS[name], tmp_path)
    everything = {**reference.config.to_dict(), **json.loads((tmp_path / "config.json").read_text())}
    family, fields = find_family(everything), Fields(everything, everything["model_type"])
    task = find_task(family, everything)
    family.build(fields, task, {"pooler.dense.weight"})
    assert fields.unknown() == []
    with pytest.warns(UserWarning, match="a_field_from_the_future"):
        (tmp_path / "config.json").write_text(json.dumps({**everything, "a_field_from_the_future": 2}))
        kt.pretrained.load(tmp_path)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_fields_that_are_left_out_have_the_defaults_of_the_class(name, tmp_path):
    """What version 4 wrote: only what differs from the defaults."""
    reference = make(*TEXT_MODELS[name], tmp_path)
    defaults = type(reference.config)().to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    kept = {key: value for key, value in written.items() if key == "architectures" or defaults.get(key) != value}
    needed = {
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    }
    kept |= {key: written[key] for key in needed & set(written)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        (tmp_path / "config.json").write_text(json.dumps(kept))
        model = kt.pretrained.load(tmp_path)
    batch = text_batch(reference, "right")
    assert_close(outputs_of(model, batch), expected(reference, batch), batch["padding_mask"].astype(bool))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bert", {"is_decoder": True}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"hidden_act": "laplace"}),
        ("gpt2", {"add_cross_attention": True}),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("gemma", {"use_bidirectional_attention": True}),
        ("gemma", {"hidden_activation": "silu"}),
        ("llama", {"hidden_size": None}),
    ],
)
def test_values_without_an_implementation_are_refused_by_name(name, values, tmp_path):
    make(*TEXT_MODELS[name], tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, **values}))
    field, value = next(iter(values.items()))
    value = value["rope_type"] if isinstance(value, dict) and value["rope_type"] != "default" else ""
    field = "scaling|partial_rotary_factor" if field == "rope_parameters" else field
    with pytest.raises(ValueError, match=rf"(?s)({field}).*{value if isinstance(value, str) else ''}"):
        kt.pretrained.load(tmp_path)
    assert keras.config.dtype_policy().name == "float32"
