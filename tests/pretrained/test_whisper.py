"""Whisper, held to what transformers computes with the same checkpoint."""

import json

import keras
import numpy as np
import pytest
from reference_checkpoints import make

import keras_transformer as kt
from keras_transformer.pretrained.checkpoint import Checkpoint, read_json

TINY = {
    "vocab_size": 99, "num_mel_bins": 8, "d_model": 32, "max_source_positions": 30, "max_target_positions": 20,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}  # fmt: skip
LOPSIDED = {
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_layers": 3,
    "decoder_attention_heads": 8, "decoder_ffn_dim": 80, "num_mel_bins": 5, "max_source_positions": 17,
    "activation_function": "relu", "scale_embedding": True, "tie_word_embeddings": False,
}  # fmt: skip

# name -> (architecture, configuration)
MODELS = {
    "whisper": ("WhisperForConditionalGeneration", TINY),
    "whisper, bare": ("WhisperModel", TINY),
    "whisper, others": ("WhisperForConditionalGeneration", {**TINY, **LOPSIDED}),
}


def batch_for(configuration, rows=3, length=7):
    random = np.random.default_rng(2)
    frames = (rows, 2 * configuration["max_source_positions"], configuration["num_mel_bins"])
    return {
        "features": random.normal(size=frames).astype("float32"),
        "target_ids": random.integers(3, 99, (rows, length)).astype("int32"),
    }


def ours(model, batch):
    result = model(batch)
    result = result if isinstance(result, dict) else {"logits": result}
    return {name: keras.ops.convert_to_numpy(value) for name, value in result.items()}


def theirs(reference, batch):
    import torch

    features = torch.tensor(batch["features"].transpose(0, 2, 1))
    with torch.no_grad():
        result = reference(features, decoder_input_ids=torch.tensor(batch["target_ids"]).long())
    if "logits" in result:
        return {"logits": result.logits.numpy()}
    return {"hidden_states": result.last_hidden_state.numpy(), "context": result.encoder_last_hidden_state.numpy()}


def assert_close(found, wanted, tolerance=1e-5):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max(), name


@pytest.mark.filterwarnings("error:The configuration of")
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_what_is_saved_are_those_of_transformers(name, tmp_path):
    reference = make(*MODELS[name], tmp_path / "theirs")
    model = kt.pretrained.load(tmp_path / "theirs")
    batch = batch_for(MODELS[name][1])
    wanted = theirs(reference, batch)
    assert_close(ours(model, batch), wanted)
    kt.pretrained.save(model, tmp_path / "ours")
    again, report = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(theirs(again.eval(), batch), wanted, 1e-6)
    first, second = Checkpoint(tmp_path / "theirs"), Checkpoint(tmp_path / "ours")
    assert set(first) == set(second)
    for tensor in first:
        np.testing.assert_array_equal(first[tensor], second[tensor], err_msg=tensor)
    model.save(tmp_path / "model.keras")
    assert_close(ours(keras.models.load_model(tmp_path / "model.keras"), batch), wanted)


def test_fields_that_are_left_out_are_those_of_the_class(tmp_path):
    kept = {"vocab_size": 99, "max_source_positions": 10, "encoder_layers": 1, "decoder_layers": 1}
    reference = make("WhisperForConditionalGeneration", {**kept, "pad_token_id": 0}, tmp_path)
    written = {**kept, "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    batch = batch_for({**kept, "num_mel_bins": 80})
    model = kt.pretrained.load(tmp_path)
    assert_close(ours(model, batch), theirs(reference, batch))
    assert model.get_layer("decoder_position").max_length == 448


def test_features_have_the_one_length_that_there_are_positions_for(tmp_path):
    reference = make(*MODELS["whisper"], tmp_path)
    model = kt.pretrained.load(tmp_path)
    batch = batch_for(TINY)
    for short in ({**batch, "features": batch["features"][:, :-2]}, {**batch, "features": batch["features"][..., :-1]}):
        with pytest.raises(ValueError, match=r"features.*\(None, 60, 8\)"):
            model(short)
    with pytest.raises(ValueError, match="60"):
        theirs(reference, {**batch, "features": batch["features"][:, :-2]})


def test_rates_of_dropout_are_followed_and_positions_of_sound_stay_as_they_are(tmp_path):
    make("WhisperForConditionalGeneration", {**TINY, "dropout": 0.1, "attention_dropout": 0.2}, tmp_path)
    changed = {**read_json(tmp_path, "config.json"), "activation_dropout": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    model = kt.pretrained.load(tmp_path)
    assert [x.path for x in model.non_trainable_weights if "seed" not in x.path] == ["encoder_position/position_table"]
    for side in ("encoder", "decoder"):
        block = model.get_layer(f"{side}_block_0")
        rates = block.dropout, block.self_attention.dropout, block.feed_forward.dropout
        assert (*rates, model.get_layer(f"{side}_embedding_dropout").rate) == (0.1, 0.2, 0.3, 0.1)
    assert model.get_layer("decoder_block_1").cross_attention.dropout == 0.2
