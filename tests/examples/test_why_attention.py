"""The comparison of an LSTM, a GRU and a Transformer: that its task is what it says, and what a run leaves behind."""

import json
import sys

import keras
import numpy as np
import pytest
from script_run import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("why_attention")


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["why_attention.py", *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("distance", [4, 16, 100])
def test_the_answer_stands_at_the_distance_and_nowhere_else(script, distance):
    tokens, answers = script.sequences(distance, 200, np.random.default_rng(0))
    assert tokens.shape == (200, distance + 2) and tokens.min() > 0 and tokens.max() < script.VOCABULARY
    asked = tokens[:, -1] - script.QUESTIONS
    facts = (tokens > 0) & (tokens < script.QUESTIONS)
    assert (facts.sum(axis=1) == script.FACTS).all()
    names, values = np.divmod(tokens - 1, script.VALUES)
    found = facts & (names == asked[:, None])
    assert (found.sum(axis=1) == 1).all() and found[:, 1].all()  # The distance is that from there to the question.
    np.testing.assert_array_equal(values[found], answers)
    assert len(set(asked.tolist())) == script.FACTS and len(set(answers.tolist())) == script.VALUES


def test_models_are_of_one_size(script):
    sizes = [model.count_params() for model in script.build_models(32)]
    assert max(sizes) < 1.05 * min(sizes)


def test_gradient_is_that_of_the_embedded_fact(script):
    """Held to differences of the loss when one row of the embedding, which stands at one place alone, is moved."""
    import tensorflow as tf

    model = script.build_models(8)[2]
    keras.utils.set_random_seed(0)
    tokens, answers = script.sequences(6, 16, np.random.default_rng(6))
    behind = keras.Model([model.get_layer("embedding").output, model.input], model.output)
    embedded = model.get_layer("embedding")(tokens).numpy()

    def losses(x):
        logits = behind([tf.constant(x), tf.constant(tokens)])
        return keras.losses.sparse_categorical_crossentropy(answers, logits, from_logits=True).numpy()

    slopes = np.zeros((16, 8))
    for i in range(8):
        change = np.zeros_like(embedded)
        change[:, 1, i] = 1e-2
        slopes[:, i] = (losses(embedded + change) - losses(embedded - change)) / 2e-2
    expected = np.linalg.norm(slopes, axis=-1).mean()
    np.testing.assert_allclose(script.gradient_at(model, 6), expected, rtol=0.02)


def test_what_a_run_leaves(script, tmp_path, monkeypatch, capsys):
    sizes = ["--distances", 4, 8, "--epochs", 1, "--steps", 2, "--dim", 8]
    run(script, monkeypatch, *sizes, "--output", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["GRU.keras", "LSTM.keras", "logs", "metrics.json", "model.keras", "why_attention.png"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["distances"] == [4, 8]
    for name in ("LSTM", "GRU", "Transformer"):
        assert all(0 <= x <= 1 for x in metrics[name]["accuracy"])
        for key in ("gradient_untrained", "gradient_trained", "step_seconds"):
            assert len(metrics[name][key]) == 2 and min(metrics[name][key]) > 0
    printed = capsys.readouterr().out
    assert printed.count("Transformer, epoch 1/1") == 1
    assert "step_seconds                 4         8" in printed


BAD_INPUT = {
    "near": (["--distances", "3"], "--distances at least 4"),
    "dim": (["--dim", "30"], "--dim a multiple of 4"),
    "output": (["--output", "mine"], "--output must be a new or empty directory"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(script, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.md").write_text("irreplaceable")
    with pytest.raises(SystemExit) as error:
        run(script, monkeypatch, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
