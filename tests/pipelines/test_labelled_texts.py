"""Labelled texts: every format gives the same, what does not fit is named by file and line, and nothing is lost."""

import collections
import gzip
import json

import keras
import numpy as np
import pytest

import keras_transformer as kt
from keras_transformer.pipelines import emoji_names, read_labelled_texts, split_by_group, text_batches, train_words

TEXTS, LABELS = ["Dull, long", 'A "delight"!', "größer 🙂"], ["bad", "good", "1"]
JSON = "".join(
    json.dumps({"label": label, "text": text, "rest": 1}) + "\n"
    for text, label in zip(TEXTS, ["bad", "good", 1], strict=True)
)
CSV = '"Dull, long",bad\n"A ""delight""!",good\ngrößer 🙂,1\n'
TSV = 'bad\tDull, long\ngood\tA "delight"!\n1\tgrößer 🙂\n'
FILES = {
    "reviews.jsonl": JSON,
    "reviews.csv": "text,label\n" + CSV,
    "capitals.csv": "Text , Label\n" + CSV,
    "reviews.tsv": "label\ttext\n" + TSV,
    "no_header.tsv": TSV,
    "more_columns.tsv": "id\tlabel\ttext\n" + "".join(f"{i}\t{line}\n" for i, line in enumerate(TSV.splitlines())),
    "windows.tsv": TSV.replace("\n", "\r\n"),
}


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_formats(tmp_path, name, ending):
    assert read_labelled_texts(write(tmp_path / (name + ending), FILES[name])) == (TEXTS, LABELS)


def test_new_line_within_quotes(tmp_path):
    path = write(tmp_path / "reviews.csv", 'label,text\ngood,"one\ntwo"\nbad,\n')
    with pytest.raises(ValueError, match=r"reviews\.csv, line 4: a text must be"):
        read_labelled_texts(path)
    assert read_labelled_texts(write(path, 'label,text\ngood,"one\ntwo"\n')) == (["one\ntwo"], ["good"])


BAD_FILES = {
    "unknown format": ("reviews.xml", "x", r"one of \.jsonl, \.csv, \.tsv, \.jsonl\.gz, .*reviews\.xml"),
    "no JSON": ("r.jsonl", JSON + "{oops\n", r"r\.jsonl, line 4: a line must be a JSON object"),
    "no object": ("r.jsonl", "[1, 2]\n", r"r\.jsonl, line 1: .*`label` and `text`"),
    "no label": ("r.jsonl", JSON + '{"text": "a"}\n', r"r\.jsonl, line 4: .*`label` and `text`"),
    "null label": ("r.jsonl", '{"label": null, "text": "a"}\n', r"line 1: a label must be .*None"),
    "empty label": ("r.csv", "label,text\n ,a\n", r"r\.csv, line 2: a label must be"),
    "empty text": ("r.tsv", TSV + "bad\t  \n", r"r\.tsv, line 4: a text must be .*'  '"),
    "number for a text": ("r.jsonl", '{"label": 1, "text": 5}\n', r"line 1: a text must be .*5"),
    "one column": ("r.tsv", TSV + "bad\n", r"r\.tsv, line 4: a row must have 2 columns.* Received 1"),
    "more than the header": ("r.csv", "label,text\na,b,c\n", r"r\.csv, line 2: a row must have 2 columns"),
    "open quote": ("r.csv", 'label,text\na,b\na,"b\n', r"r\.csv, line 3: the row that begins here is broken"),
    "header alone": ("r.csv", "label,text\n", "a header alone"),
    "empty": ("r.csv", "", r"r\.csv is empty"),
    "undecodable": ("r.csv", b"label,text\na,\xe9\n", r"r\.csv, line 2: .*UTF-8"),
}


@pytest.mark.parametrize("name, text, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_labelled_texts(write(tmp_path / name, text))


def test_known_labels(tmp_path):
    path = write(tmp_path / "r.tsv", TSV)
    assert read_labelled_texts(path, known=["bad", "good", "1"]) == (TEXTS, LABELS)
    with pytest.raises(ValueError, match=r"r\.tsv, line 3: a label must be one of \['bad', 'good'\]; received '1'"):
        read_labelled_texts(path, known=["bad", "good"])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_labelled_texts(tmp_path / "absent.csv")


def test_names_of_emoji():
    names = emoji_names()
    languages = collections.Counter(language for _, language, _ in names)
    assert len(languages) == 8 and set(languages.values()) == {len({character for *_, character in names})}
    assert len(names) > 12000
    assert {"visage rieur", "grinsendes gesicht"} <= {name for name, _, character in names if character == "😀"}
    assert not any(":" in name[:1] or "_" in name for name, *_ in names)
    with pytest.raises(ValueError, match=r"two or more of ar, de, .*\['en', 'xx'\]"):
        emoji_names(["en", "xx"])
    with pytest.raises(ValueError, match="two or more"):
        emoji_names(["en"])


def test_no_group_is_in_both_parts():
    rows = [(i % 37, i) for i in range(200)]
    train, held_out = split_by_group(rows, [group for group, _ in rows], share=0.3, seed=1)
    assert sorted(train + held_out) == sorted(rows)
    groups = [{group for group, _ in part} for part in (train, held_out)]
    assert not groups[0] & groups[1] and len(groups[1]) == 11
    assert split_by_group(rows, [group for group, _ in rows], share=0.3, seed=1) == (train, held_out)
    assert split_by_group(rows, [group for group, _ in rows], share=0.3, seed=2) != (train, held_out)
    with pytest.raises(ValueError, match="`groups` must have one for each row"):
        split_by_group(rows, [1])
    with pytest.raises(ValueError, match="`share` must hold out"):
        split_by_group([1, 2], [1, 1])


def rows_of(count=203, seed=0):
    """Rows that tell by their ids which label they have."""
    lengths = np.random.default_rng(seed).integers(1, 60, count)
    return [[10 + i] * length for i, length in enumerate(lengths)], list(range(count))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 16, 500])
def test_every_row_comes_once_in_an_epoch(batch_size, shuffle):
    rows, labels = rows_of()
    batches = text_batches(rows, labels, batch_size, shuffle, buckets=5)
    seen = [list(batches.as_numpy_iterator()) for _ in range(2)]
    for epoch in seen:
        assert len(epoch) == int(batches.cardinality())
        assert len({ids.shape for ids, *_ in epoch}) <= 5
        assert {len(labels) for _, labels, _ in epoch} == {batch_size}
        found = {}
        for ids, labels, weights in epoch:
            for row, label, weight in zip(ids, labels, weights, strict=True):
                assert row[0] == 10 + label and set(row) <= {0, 10 + label}
                if weight:
                    assert label not in found
                    found[label] = row[row != 0].tolist()
        assert [found[i] for i in range(len(rows))] == rows
    if batch_size > 1:
        same = all(np.array_equal(one[1], other[1]) for one, other in zip(*seen, strict=True))
        assert same is not shuffle
        again = list(text_batches(rows, range(203), batch_size, shuffle, buckets=5).as_numpy_iterator())
        assert all(np.array_equal(one[1], other[1]) for one, other in zip(seen[0], again, strict=True))


def test_training_traces_once_a_bucket_and_does_not_count_what_fills_up():
    rows, labels = rows_of()
    traces = []

    class Traced(keras.layers.Layer):
        supports_masking = True

        def call(self, x):
            traces.append(tuple(x.shape))
            return x

    inputs = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(300, 4, mask_zero=True)(inputs)
    x = keras.layers.GlobalAveragePooling1D()(Traced()(x))
    model = keras.Model(inputs, keras.layers.Dense(203)(x))
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
        jit_compile=False,
    )
    batches = text_batches(rows, labels, 16, buckets=4)
    traces.clear()
    model.fit(batches, epochs=2, verbose=0)
    assert len(traces) <= 4
    truth = np.mean([np.argmax(model(np.array([row])), axis=-1)[0] == i for i, row in enumerate(rows)])
    score = model.evaluate(text_batches(rows, labels, 64, shuffle=False), verbose=0, return_dict=True)
    np.testing.assert_allclose(score["accuracy"], truth, atol=1e-6)


def test_several_inputs_and_labels_of_tokens():
    rows, _ = rows_of(50)
    targets = [[1000 + row[0]] * (1 + i % 7) for i, row in enumerate(rows)]
    inputs = {"source_ids": rows, "source_padding_mask": [[1] * len(row) for row in rows], "target_ids": targets}
    seen = []
    for batch, labels, weights in text_batches(inputs, targets, 8, buckets=3, pad_id=7):
        source, mask, target = (batch[name].numpy() for name in inputs)
        assert source.shape == mask.shape == target.shape == labels.shape
        np.testing.assert_array_equal(source == 7, mask == 0)
        np.testing.assert_array_equal(np.where(labels == -100, 7, labels), target)
        seen += [row[row != 7].tolist() for row, weight in zip(source, weights, strict=True) if weight]
    assert sorted(seen) == sorted(rows)


BAD_ROWS = {
    "no rows": ([], [], "at least one; received 0 rows"),
    "labels": ([[1]], [0, 1], "received 1 rows and 2 labels"),
    "empty row": ([[1], []], [0, 1], "received number 1 without a token"),
    "inputs": ({"a": [[1]], "b": [[1], [2]]}, [0], "received 1 and 2 rows and 1 labels"),
    "empty labels": ([[1], [2]], [[3], []], "received number 1 without a token"),
}


@pytest.mark.parametrize("rows, labels, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        text_batches(rows, labels, 4)


def test_words(tmp_path):
    texts = ["It's GREAT<br /><br />fun, fun\u00a0fun!", "Größer als 3,5", "٣ ﬁne"]
    tokenizer = train_words(texts, 100)
    assert tokenizer.get_vocabulary()[4:] == ["fun", "3", "5", "als", "fine", "great", "größer", "it's", "٣"]
    assert [[tokenizer.id_to_token(i) for i in row] for row in kt.pipelines.token_ids(tokenizer, ["Fun? NO."])] == [
        ["fun", "<unknown>"]
    ]
    marks = train_words(texts, 6, punctuation=True)
    assert marks.get_vocabulary()[4:] == ["fun", ","]
    tokenizer.save_assets(str(tmp_path))
    copy = kt.pipelines.WordTokenizer.from_config(tokenizer.get_config())
    copy.load_assets(str(tmp_path))
    assert kt.pipelines.token_ids(copy, texts) == kt.pipelines.token_ids(tokenizer, texts)
    with pytest.raises(ValueError, match="must be more than 4"):
        train_words(texts, 4)
    with pytest.raises(ValueError, match="at least one word"):
        train_words(["?!"], 9)
