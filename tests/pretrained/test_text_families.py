"""Each family of text models, held to what transformers computes with the same checkpoint."""

import pytest
from reference_checkpoints import TEXT_MODELS, assert_close, expected, make, outputs_of, text_batch

import keras_transformer as kt
from keras_transformer.pretrained.checkpoint import Checkpoint

LEFT = ("gpt2", "llama", "mistral", "qwen2", "gemma", "gemma2")


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_outputs_and_what_is_saved_are_those_of_transformers(name, tmp_path):
    reference = make(*TEXT_MODELS[name], tmp_path / "theirs")
    model = kt.pretrained.load(tmp_path / "theirs")
    for padding in ("none", "right", *(["left"] if name.split(",")[0] in LEFT else [])):
        batch = text_batch(reference, padding)
        real = batch["padding_mask"].astype(bool)
        wanted = expected(reference, batch, positions=padding == "left")
        assert_close(outputs_of(model, batch), wanted, real)
    kt.pretrained.save(model, tmp_path / "ours")
    again, report = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(expected(again.eval(), batch), expected(reference, batch), real, 1e-6)
    shapes = [{n: c.shape(n) for n in c} for c in (Checkpoint(tmp_path / "theirs"), Checkpoint(tmp_path / "ours"))]
    assert shapes[0] == shapes[1]
