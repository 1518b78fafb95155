"""Texts to windows of tokens: nothing lost on the way, and holes that are filled from both sides."""

import numpy as np
import pytest

from keras_transformer.pipelines import fill_in_the_middle, read_texts, token_stream, token_windows, train_byte_pairs
from keras_transformer.pipelines.graph_tokenizer import GraphTokenizer
from keras_transformer.pipelines.language_data import SPECIAL

CODE = ["def add(a, b):\n    return a + b\n", "class A:\n\tpass\r\n\n\n", "größe = '日本 🙂'\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_pairs(CODE * 3, 300)


def test_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {"b/x.py": "b", "a.py": "a\n", "empty.py": " \n", "c.txt": "c"}.items():
        (tmp_path / name).write_text(text)
    assert read_texts(tmp_path, ".py") == ["a\n", "b"]
    assert read_texts(tmp_path / "c.txt") == ["c"]


def test_any_text_is_told_back(tokenizer):
    for text in [*CODE, "\x00\t  \u00a0 é e\u0301 <|endoftext|", "12345   \n\n\n  x"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() <= 300
    assert len(tokenizer.encode(CODE[0]).ids) < len(CODE[0])
    GraphTokenizer.of(tokenizer)  # Which raises where its tokens differ.


def test_bytes_are_the_smallest_vocabulary():
    tokenizer = train_byte_pairs(CODE, 261)
    assert tokenizer.get_vocab_size() == 261
    assert len(tokenizer.encode("größe").ids) == 7


def test_each_text_ends(tokenizer):
    stream = token_stream(tokenizer, CODE)
    assert stream.dtype == np.int32
    ends = np.flatnonzero(stream == 1)
    assert len(ends) == 3 and ends[-1] == len(stream) - 1
    assert tokenizer.decode(stream[: ends[0]].tolist()) == CODE[0]


def test_windows_in_order_cover_all():
    ids = np.arange(5, 5 + 24)
    batches = [(x.numpy(), y.numpy()) for x, y in token_windows(ids, 5, 2, shuffle=False)]
    assert [len(inputs) for inputs, _ in batches] == [2, 2]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]).ravel(), ids[:20])
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]).ravel(), ids[1:21])


def test_shuffled_windows_begin_anywhere_and_can_be_repeated():
    ids = np.arange(5, 45)

    def windows(seed):
        return np.concatenate([x.numpy() for x, _ in token_windows(ids, 4, 8, seed=seed).take(30)])

    first = windows(0)
    assert (np.diff(first, axis=1) == 1).all()
    assert set(first[:, 0]) == set(range(5, 41))
    np.testing.assert_array_equal(windows(0), first)
    assert not np.array_equal(windows(1), first)


def test_holes_are_filled_from_what_is_around_them():
    random = np.random.default_rng(0)
    for _ in range(20):
        ids = np.arange(10, 10 + random.integers(1, 12))
        moved = fill_in_the_middle(ids, random).tolist()
        assert moved[0] == 2 and moved[-1] == 1
        suffix, middle = moved.index(3), moved.index(4)
        again = moved[1:suffix] + moved[middle + 1 : -1] + moved[suffix + 1 : middle]
        assert again == ids.tolist()
    inputs, labels = next(iter(token_windows(np.arange(5, 205), 20, 400, middle_rate=0.5)))
    share = (inputs.numpy()[:, 0] == 2).mean()
    assert 0.4 < share < 0.6
    np.testing.assert_array_equal(inputs.numpy()[:, 1:], labels.numpy()[:, :-1])


BAD_INPUT = {
    "absent": (lambda folder: read_texts(folder / "absent"), FileNotFoundError, "neither a file .*absent nor a folder"),
    "empty": (lambda folder: read_texts(folder / "empty.txt"), ValueError, "empty.txt is empty"),
    "latin": (lambda folder: read_texts(folder / "latin.txt"), ValueError, "latin.txt, line 2: .* the byte 0xe9"),
    "vocabulary": (lambda _: train_byte_pairs(CODE, 260), ValueError, "`vocabulary_size` must be at least 261"),
    "few tokens": (lambda _: token_windows([5, 6, 7], 3, 2), ValueError, "more than length=3 tokens .* received 3"),
    "length": (lambda _: token_windows([5, 6, 7], 0, 2), ValueError, "received length=0"),
    "rate": (lambda _: token_windows([5, 6, 7], 1, 2, middle_rate=2), ValueError, "received .* middle_rate=2"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(tmp_path, call, error, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"a\n\xe9\n")
    with pytest.raises(error, match=message):
        call(tmp_path)
