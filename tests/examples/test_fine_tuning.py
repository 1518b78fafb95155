"""The script that fine-tunes checkpoints, as a user runs it: what it leaves behind, and bad input."""

import json
import sys

import keras
import numpy as np
import pytest
from reference_checkpoints import make
from reference_tokenizers import SENTENCES, write_byte_pairs, write_json, write_llama, write_word_pieces
from script_run import load_script, run_script

import keras_transformer as kt

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
FILES = "checkpoint logs loss.png metrics.json model.keras saved_model"


@pytest.fixture(scope="module")
def script():
    return load_script("fine_tuning")


@pytest.fixture
def bert(tmp_path):
    size = len(write_word_pieces(tmp_path / "bert"))
    positions = {"vocab_size": size, "max_position_embeddings": 40, "pad_token_id": 0}
    make("BertForMaskedLM", {**SIZES, **positions}, tmp_path / "bert")
    rows = [("dogs", "Two dogs run in the park"), ("man", "A man reads a book"), ("man", "Ein Mann liest ein Buch")]
    lines = [f"{label}\t{text} {i}\n" for i in range(20) for label, text in rows]
    (tmp_path / "texts.tsv").write_text("".join(lines))
    return tmp_path


def run(script, monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["fine_tuning.py", *map(str, arguments)])
    script.main()
    output = folder / "fine_tuning_output"
    found = sorted(path.name for path in output.iterdir())
    assert found == ["adapters.npz"] * ("lora" in arguments) + FILES.split()
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    return output, json.loads((output / "metrics.json").read_text())


def served(output, texts):
    import tensorflow as tf
    import tensorflow_text  # noqa: F401

    answer = tf.saved_model.load(output / "saved_model").signatures["serving_default"]
    return [text.decode() for text in answer(text=tf.constant(texts))["text"].numpy()]


@pytest.mark.filterwarnings("ignore:These weights")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_encoder_learns_to_classify(method, script, bert, monkeypatch):
    options = ["--checkpoint", "bert", "--data", "texts.tsv", "--epochs", "12", "--method", method]
    output, metrics = run(script, monkeypatch, bert, *options, "--learning-rate", "1e-2", "--batch-size", "8")
    assert metrics["after"]["accuracy"] == metrics["after"]["exact_match"] == 1.0
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]
    assert (metrics["trained_parameters"] < metrics["parameters"] / 2) is (method == "lora")
    pipeline = kt.pipelines.load_pretrained(output / "checkpoint")
    texts = ["Two dogs run in the park", "A man reads a book"]
    assert pipeline.predict(texts) == served(output, texts) == ["dogs", "man"]
    model = keras.saving.load_model(output / "model.keras")
    inputs = pipeline.read(texts)
    wanted = keras.ops.convert_to_numpy(pipeline.answer.model(inputs))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(inputs)), wanted, atol=1e-5)
    given = kt.pretrained.load(bert / "bert", task="bare")
    kernels = {variable.path: np.array(variable) for variable in given.variables}
    frozen = "embedding/embeddings"
    moved = np.abs(next(np.array(x) for x in model.variables if x.path == frozen) - kernels[frozen]).max()
    assert bool(moved > 0) is (method == "full")


def test_encoder_and_decoder_learn_to_answer(script, tmp_path, monkeypatch):
    (tmp_path / "t5").mkdir()
    write_llama(tmp_path / "t5")
    write_json(tmp_path / "t5", "tokenizer_config.json", {"add_bos_token": False})
    tokenizer = kt.pipelines.read_tokenizer(tmp_path / "t5")
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    ends = {"num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    make("T5ForConditionalGeneration", {**sizes, **ends}, tmp_path / "t5")
    (tmp_path / "pairs.tsv").write_text("".join(f"{SENTENCES[i % 3]} {i}\t{SENTENCES[4]}\n" for i in range(40)))
    options = ["--checkpoint", "t5", "--data", "pairs.tsv", "--prompt", "ask: {}", "--learning-rate", "3e-2"]
    output, metrics = run(script, monkeypatch, tmp_path, *options, "--epochs", "10", "--batch-size", "8")
    assert metrics["before"]["exact_match"] == 0 and metrics["after"]["exact_match"] == 1
    tuned = kt.pretrained.load(output / "checkpoint")
    model = keras.saving.load_model(output / "model.keras")
    for ours, theirs in zip(model.weights, tuned.weights, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


def test_default_run(script, tmp_path):
    options = ["--base-steps", 2, "--epochs", 1, "--method", "lora", "--rank", 4, "--max-new-tokens", 8, "--pairs", 200]
    printed = run_script(script, tmp_path, *options)
    output = tmp_path / "fine_tuning_output"
    assert sorted(path.name for path in output.iterdir()) == sorted(["adapters.npz", "base", *FILES.split()])
    assert "180 texts to train on, 20 held out" in printed
    assert "saved_model answers:" in printed and printed.count("  right   ") == 5
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    embedding = 128 * json.loads((output / "base" / "config.json").read_text())["vocab_size"]
    assert metrics["method"] == "lora" and 0 < metrics["trained_parameters"] - embedding < 0.1 * metrics["parameters"]
    assert sorted(path.name for path in (output / "logs").iterdir()) == ["train", "validation"]


BERT = ["--checkpoint", "bert", "--data"]
GPT2 = ["--checkpoint", "gpt2", "--data"]
BAD_INPUT = {
    "no checkpoint": (["--checkpoint", "absent", "--data", "texts.tsv"], "absent/config.json must be a file"),
    "no data": (["--checkpoint", "bert"], "--checkpoint and --data belong together"),
    "missing file": ([*BERT, "absent.tsv"], "no file absent.tsv"),
    "label out of range": (
        [*BERT, "texts.tsv", "--labels", "dogs", "cats"],
        "texts.tsv, line 2: a label must be one of",
    ),
    "empty text": ([*BERT, "empty.tsv"], "empty.tsv, line 2: a text must be"),
    "empty answer": ([*GPT2, "empty.tsv"], "empty.tsv, line 2: text and answer must not be empty"),
    "no answer": ([*GPT2, "one.tsv"], "one.tsv, line 1"),
    "one class": ([*BERT, "same.tsv"], "`labels` must be two names or more"),
    "unknown method": (["--method", "half"], "invalid choice: 'half'"),
    "rank": (["--rank", "0"], "--rank, --batch-size"),
    "prompt": (["--prompt", "ask"], "--prompt must have {}"),
    "output holds other things": (["--output", "bert"], "--output must be a new or an empty directory"),
}


@pytest.mark.filterwarnings("ignore:These weights")
@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(script, bert, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(bert)
    if "gpt2" in arguments:
        size = len(write_byte_pairs(bert / "gpt2"))
        sizes = {"vocab_size": size, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 24}
        make("GPT2LMHeadModel", {**sizes, "bos_token_id": 0, "eos_token_id": 0}, bert / "gpt2")
    for name, text in {
        "empty.tsv": "a\tx\nb\t \n",
        "one.tsv": "a\n",
        "same.tsv": "".join(f"a\t{i}\n" for i in range(20)),
    }.items():
        (bert / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["fine_tuning.py", *arguments])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (bert / "fine_tuning_output").exists()
