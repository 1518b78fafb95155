"""A pipeline gives the same strings however it is batched, saved, exported, and on whichever backend it runs."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_transformer as kt
from keras_transformer.generation import Generator
from keras_transformer.pipelines import (
    Pipeline,
    load,
    number_pairs,
    token_batches,
    token_ids,
    train_sentence_piece,
    train_subwords,
)

PAIRS = number_pairs(200, "fr")
TEXTS = [text for text, _ in PAIRS]
HARD = ["", " ", "seven " * 200, "größer 🙂 日本語", "one\ttwo\nthree"]


def build_model(size):
    return kt.models.transformer(
        size, size, dim=32, depth=1, num_heads=2, hidden_dim=32, dropout=0.0, norm_position="pre"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentence_piece([text for pair in PAIRS for text in pair], 150)


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    """A model that has learnt just enough for its answers to depend on what it reads."""
    keras.utils.set_random_seed(0)
    model = build_model(tokenizer.vocabulary_size())
    model.compile(keras.optimizers.Adam(0.01), kt.training.SmoothedCrossEntropy(), jit_compile=False)
    model.fit(
        token_batches(*(token_ids(tokenizer, side) for side in zip(*PAIRS, strict=True)), 500), epochs=12, verbose=0
    )
    return Pipeline(Generator(model, start_id=1, end_id=2), tokenizer, tokenizer, max_new_tokens=12)


@pytest.fixture(scope="module")
def expected(pipeline):
    return pipeline.predict(TEXTS + HARD)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline.save(directory)
    return directory


class Echo:
    """Stands in for a generator and answers with what it read."""

    def __init__(self, name="source_ids", start_id=1, end_id=2):
        self.model = keras.Model(*[keras.Input((None,), dtype="int32", name=name)] * 2)
        self.name, self.start_id, self.end_id, self.pad_id = name, start_id, end_id, 0

    def generate_tensors(self, inputs, max_new_tokens):
        return tf.pad(inputs[self.name], [[0, 0], [0, max_new_tokens]])[:, :max_new_tokens]

    def generate(self, inputs, max_new_tokens):
        return self.generate_tensors(inputs, max_new_tokens).numpy()


def run(code, *arguments, backend="tensorflow"):
    """Runs code in a fresh process away from the checkout, and returns what it prints as JSON."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["source_ids", "token_ids"])
def test_nothing_of_the_text_is_lost(tokenizer, name):
    echo = Pipeline(Echo(name), tokenizer, tokenizer, max_new_tokens=1000)
    long = " ".join(TEXTS[:60])
    assert len(long.split()) > 200
    assert echo.predict([long, "", TEXTS[0]]) == [long, "", TEXTS[0]]


def test_model_reads_source_and_end(tokenizer):
    read = []

    class Recorder(Echo):
        def generate_tensors(self, inputs, max_new_tokens):
            tf.py_function(lambda ids: read.append(ids.numpy().tolist()), [inputs[self.name]], [])
            return super().generate_tensors(inputs, max_new_tokens)

    for name, frame in (("source_ids", ([], [2])), ("token_ids", ([1], []))):
        read.clear()
        Pipeline(Recorder(name), tokenizer, tokenizer).predict(["seven", ""])
        ids = tokenizer.tokenize(["seven"])[0]
        row = [*frame[0], *ids, *frame[1]]
        empty = [*frame[0], *frame[1]]
        assert read == [[row, empty + [0] * (len(row) - len(empty))]]


def test_order_and_batch_size_change_nothing(pipeline, expected):
    texts = TEXTS + HARD
    assert len(set(expected)) > 50
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = pipeline.predict([texts[i] for i in order], batch_size=17)
    assert shuffled == [expected[i] for i in order]
    assert [pipeline.predict([text])[0] for text in texts[-8:]] == expected[-8:]
    assert pipeline.predict([]) == []


def test_agrees_with_the_generator(pipeline, tokenizer, expected):
    ids = [[*row, 2] for row in tokenizer.tokenize(TEXTS[:20])]
    generated = pipeline.generator.generate({"source_ids": ids}, 12)
    assert tokenizer.detokenize([[int(i) for i in row if i > 2] for row in generated]) == expected[:20]


def test_saved_and_loaded(saved, expected):
    again = load(saved)
    assert again.predict(TEXTS + HARD) == expected
    assert again.source is again.target and again.max_new_tokens == 12
    assert sorted(path.name for path in saved.iterdir()) == ["model.keras", "pipeline.json", "tokenizer"]
    assert sorted(path.name for path in saved.parent.iterdir()) == ["pipeline"]


def test_two_tokenizers(tmp_path):
    source, target = train_subwords(TEXTS), train_subwords([text for _, text in PAIRS])
    model = build_model(max(source.vocabulary_size(), target.vocabulary_size()))
    pipeline = Pipeline(Generator(model, start_id=1, end_id=2), source, target, max_new_tokens=5)
    pipeline.save(str(tmp_path / "p"))
    again = load(str(tmp_path / "p"))
    assert again.source.get_vocabulary() == source.get_vocabulary()
    assert again.target.get_vocabulary() == target.get_vocabulary()
    assert again.predict(TEXTS[:9]) == pipeline.predict(TEXTS[:9])


def test_saved_anywhere_names_nothing_here(saved):
    for path in saved.rglob("*"):
        if path.is_file():
            assert str(saved.parent).encode() not in path.read_bytes(), path.name


EXPORT = """
import json, sys
import keras_transformer as kt
pipeline = kt.pipelines.load(sys.argv[1])
pipeline.export(sys.argv[2])
print(json.dumps(pipeline.predict(json.load(open(sys.argv[3])))))
"""
SERVE = """
import json, sys
import tensorflow as tf, tensorflow_text
module = tf.saved_model.load(sys.argv[1])
translate = module.signatures["serving_default"]
texts = json.load(open(sys.argv[2]))
results = {}
for size in (1, 17):
    batches = [translate(text=tf.constant(texts[i : i + size])) for i in range(0, len(texts), size)]
    assert all(list(batch) == ["text"] for batch in batches)
    results[size] = [text.decode() for batch in batches for text in batch["text"].numpy()]
foreign = [name for name in sys.modules if name.split(".")[0] in ("keras_transformer", "keras_nlp", "keras_hub")]
print(json.dumps([results, foreign]))
"""


@pytest.mark.compiled
def test_export_serves_the_same_strings(pipeline, tokenizer, expected, tmp_path):
    generator = Generator(pipeline.generator.model, start_id=1, end_id=2)
    Pipeline(generator, tokenizer, tokenizer, max_new_tokens=12).save(tmp_path / "saved")
    texts, expected = TEXTS[:25] + HARD, expected[:25] + expected[-len(HARD) :]  # In batches of 1, and of 17 and 13.
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    assert run(EXPORT, tmp_path / "saved", tmp_path / "exported", tmp_path / "texts.json") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "saved", "texts.json"]
    (tmp_path / "exported").rename(tmp_path / "elsewhere")
    results, foreign = run(SERVE, tmp_path / "elsewhere", tmp_path / "texts.json")
    assert not foreign
    assert results == {"1": expected, "17": expected}


def test_the_signature_attention_says_what_the_model_looked_at(pipeline, tokenizer, tmp_path):
    pipeline.export(tmp_path / "exported")
    signature = tf.saved_model.load(tmp_path / "exported").signatures["attention"]
    texts = ["seven", "forty-two thousand and one"]
    found = {name: value.numpy() for name, value in signature(text=tf.constant(texts)).items()}
    assert [text.decode() for text in found["text"]] == pipeline.predict(texts)
    for row, text in enumerate(texts):
        ids = [*map(int, tokenizer.tokenize(text)), 2]
        assert [*filter(None, found["source_tokens"][row])] == [tokenizer.id_to_token(i).encode() for i in ids]
        new = pipeline.generator.generate({"source_ids": [ids]}, pipeline.max_new_tokens)[0]
        new = new[: np.argmax(new == 2) + 1] if 2 in new else new
        assert [*filter(None, found["target_tokens"][row])] == [tokenizer.id_to_token(i).encode() for i in new]
        inputs = {"source_ids": [ids], "target_ids": [[1, *new[:-1]]]}
        maps = kt.inspection.attention_maps(pipeline.generator.model, inputs)
        (expected,) = (x[0] for path, x in maps.items() if "cross_attention" in path)  # [heads, T, S]
        own = found["attention"][row, 0, :, : len(new), : len(ids)]
        np.testing.assert_allclose(own, expected, atol=1e-5)
        np.testing.assert_allclose(own.sum(-1), 1, atol=1e-5)


OTHER_BACKEND = """
import json, sys
import keras_transformer as kt
pipeline = kt.pipelines.load(sys.argv[1])
try:
    pipeline.export(sys.argv[2])
except RuntimeError as error:
    print(json.dumps([str(error), pipeline.predict(json.load(open(sys.argv[3])))]))
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_predict_and_refuse_to_export(saved, expected, tmp_path, backend):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS[:20] + HARD))
    error, texts = run(OTHER_BACKEND, saved, tmp_path / "exported", tmp_path / "texts.json", backend=backend)
    assert "TensorFlow backend" in error and backend in error
    assert texts == expected[:20] + expected[-len(HARD) :]
    assert not (tmp_path / "exported").exists()


def decoder_only(size):
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    x = kt.layers.PositionalEmbedding()(keras.layers.Embedding(size, 16, mask_zero=True)(token_ids))
    logits = keras.layers.Dense(size)(kt.layers.DecoderBlock(2, 32)(x))
    model = keras.Model(token_ids, logits)
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=weight.shape).astype("float32") for weight in model.weights])
    return model


def test_decoder_only_continues_the_prompt(tokenizer, tmp_path):
    generator = Generator(decoder_only(tokenizer.vocabulary_size()), end_id=2)
    pipeline = Pipeline(generator, tokenizer, tokenizer, max_new_tokens=8)
    prompts = TEXTS[:6]
    generated = generator.generate({"token_ids": tokenizer.tokenize(prompts)}, 8)
    expected = tokenizer.detokenize([[int(i) for i in row if i > 2] for row in generated])
    assert pipeline.predict(prompts) == expected
    pipeline.save(tmp_path / "p")
    assert load(tmp_path / "p").predict(prompts) == expected
    with pytest.raises(Exception, match="at least one token"):
        pipeline.predict(["seven", ""])
    started = Pipeline(Generator(generator.model, start_id=1, end_id=2), tokenizer, tokenizer, max_new_tokens=8)
    assert len(started.predict(["seven", ""])) == 2


@pytest.mark.parametrize(
    "generator, options, message",
    [
        (lambda: Echo("images"), {}, r"`source_ids`.*`token_ids`.*\['images'\]"),
        (lambda: Echo(end_id=None), {}, "`end_id`"),
        (Echo, {"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer; received 0"),
    ],
)
def test_refuses(tokenizer, generator, options, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(generator(), tokenizer, tokenizer, **options)


@pytest.mark.parametrize("texts", ["one string", [b"bytes"], ["a", 3], ["a", None]])
def test_predict_takes_strings_only(tokenizer, texts):
    with pytest.raises(ValueError, match="`texts` must be a list of strings"):
        Pipeline(Echo(), tokenizer, tokenizer).predict(texts)


def test_other_files_are_never_overwritten(pipeline, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for write in (pipeline.save, pipeline.export) if keras.backend.backend() == "tensorflow" else (pipeline.save,):
        with pytest.raises(FileExistsError, match=rf"{tmp_path}, which holds file, notes\.txt"):
            write(tmp_path)
        with pytest.raises(FileExistsError, match="file"):
            write(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes.txt"]


def test_earlier_pipeline_is_replaced(pipeline, tokenizer, tmp_path):
    (tmp_path / "p").mkdir()
    pipeline.save(tmp_path / "p")
    other = Pipeline(pipeline.generator, tokenizer, tokenizer, max_new_tokens=3)
    other.save(tmp_path / "p")
    assert load(tmp_path / "p").max_new_tokens == 3
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_failed_save_leaves_the_earlier_one(pipeline, tmp_path, monkeypatch):
    pipeline.save(tmp_path / "p")

    def fail(directory):
        raise OSError("no space left")

    monkeypatch.setattr(pipeline.source, "save_assets", fail)
    with pytest.raises(OSError, match="no space left"):
        pipeline.save(tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert load(tmp_path / "p").max_new_tokens == 12


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*pipeline\.json"):
        load(tmp_path)
