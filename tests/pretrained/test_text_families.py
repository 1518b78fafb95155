"""Each family of text models, held to what transformers computes with the same checkpoint."""

import keras
import numpy as np
import pytest
from reference_checkpoints import TEXT_MODELS, expected, make, text_batch

import keras_transformer as kt
from keras_transformer.pretrained.checkpoint import Checkpoint

LEFT = ("gpt2", "llama", "mistral", "qwen2", "gemma", "gemma2")


def outputs_of(model, batch):
    names = [x.name for x in model.inputs]
    result = model({name: batch[name] for name in names})
    result = result if isinstance(result, dict) else {"logits": result}
    return {name: keras.ops.convert_to_numpy(value) for name, value in result.items()}


def assert_close(found, wanted, real, tolerance=1e-5):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        by_token = value.ndim == 3
        value, own = (x[real] if by_token else x for x in (value, found[name]))
        assert np.abs(own - value).max() <= tolerance * np.abs(value).max(), name


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
