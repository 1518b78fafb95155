"""The three kinds of tokenizers, through one table: the same ids, the same answers in a graph and outside of it."""

import unicodedata

import keras
import keras_nlp
import pytest
import tensorflow as tf

from keras_transformer.pipelines import (
    SubwordTokenizer,
    WordPieceTokenizer,
    token_ids,
    train_sentence_piece,
    train_subwords,
    train_word_piece,
)

TEXTS = [
    "ein kleines Mädchen klettert in ein Spielhaus aus Holz .",
    "zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche .",
    "a man in a blue shirt is standing on a ladder cleaning a window .",
    "два человека 🙂 играют в 日本語 !",
]
SUBWORDS = [text.replace("Spielhaus", "Spiel@@ haus").replace("ladder", "la@@ d@@ der") for text in TEXTS]

TRAINERS = {
    "sentencepiece": lambda: train_sentence_piece(TEXTS, 150),
    "wordpiece": lambda: train_word_piece(TEXTS, 300),
    "subwords": lambda: train_subwords(SUBWORDS),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: train() for kind, train in TRAINERS.items()}


@pytest.fixture(params=TRAINERS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(tokenizers, kind):
    return tokenizers[kind]


def texts_for(kind):
    return SUBWORDS if kind == "subwords" else TEXTS


def detokenize(tokenizer, ids):
    """Detokenizes in a graph, as an exported pipeline does."""
    function = tf.function(tokenizer.detokenize, input_signature=[tf.TensorSpec([None, None], "int32")])
    return [text.decode() for text in function(tf.constant(ids, "int32")).numpy()]


def padded(rows):
    width = max(map(len, rows))
    return [[*row, *[0] * (width - len(row))] for row in rows]


def test_round_trip(tokenizer, kind):
    ids = token_ids(tokenizer, texts_for(kind))
    assert all(3 < i < tokenizer.vocabulary_size() for row in ids for i in row)
    # Around CJK characters WordPiece puts the spaces of words.
    expected = [text.replace("日本語", "日 本 語") if kind == "wordpiece" else text for text in TEXTS]
    assert detokenize(tokenizer, padded(ids)) == expected


def test_special_ids_are_left_out(tokenizer, kind):
    ids = token_ids(tokenizer, texts_for(kind))
    assert detokenize(tokenizer, padded([[1, *row, 2, 0] for row in ids])) == detokenize(tokenizer, padded(ids))
    assert detokenize(tokenizer, [[0, 0, 0], [1, 2, 0]]) == ["", ""]


def test_empty_and_blank_text(tokenizer):
    assert token_ids(tokenizer, ["", "   ", "a"])[:2] == [[], []]
    assert token_ids(tokenizer, []) == []
    assert detokenize(tokenizer, [[], []]) == ["", ""]


def test_unknown_characters_have_the_unknown_id(tokenizer):
    (row,) = token_ids(tokenizer, ["a ≈ a"])
    assert 3 in row and row[0] == row[-1] != 3


def test_special_names_in_text_are_only_text(tokenizer):
    names = [tokenizer.id_to_token(i) for i in range(3)]
    assert not {0, 1, 2} & {i for row in token_ids(tokenizer, names) for i in row}


def test_eager_calls_agree_with_the_graph(tokenizer, kind):
    texts = [*texts_for(kind), "", "a Haus ≈"]
    expected = token_ids(tokenizer, texts)
    eager = tokenizer.tokenize(texts)
    assert (eager.to_list() if isinstance(eager, tf.RaggedTensor) else eager) == expected
    assert list(tokenizer(texts[0])) == expected[0]
    together = [
        t.decode() if isinstance(t, bytes) else t for t in list(tf.constant(tokenizer.detokenize(expected)).numpy())
    ]
    assert together == detokenize(tokenizer, padded(expected))


def test_batch_in_a_dataset(tokenizer, kind):
    dataset = tf.data.Dataset.from_tensor_slices(texts_for(kind)).batch(3).map(tokenizer)
    assert [row for batch in dataset for row in batch.to_list()] == token_ids(tokenizer, texts_for(kind))
    one_by_one = tf.data.Dataset.from_tensor_slices(texts_for(kind)).map(tokenizer)
    assert [row.numpy().tolist() for row in one_by_one] == token_ids(tokenizer, texts_for(kind))


def test_graphs_outlive_a_new_seed(tokenizer, kind):
    """Setting the seed clears TensorFlow's kernel cache, and with it what only a kernel owned."""
    function = tf.function(tokenizer.tokenize, input_signature=[tf.TensorSpec([None], "string")])
    before = function(tf.constant(texts_for(kind))).to_list()
    keras.utils.set_random_seed(5)
    assert function(tf.constant(texts_for(kind))).to_list() == before


def test_configuration_and_assets(tokenizer, kind, tmp_path):
    config = keras.saving.serialize_keras_object(tokenizer)
    assert str(tmp_path) not in str(config)
    tokenizer.save_assets(str(tmp_path))
    again = keras.saving.deserialize_keras_object(config)
    again.load_assets(str(tmp_path))
    assert type(again) is type(tokenizer)
    assert again.get_vocabulary() == tokenizer.get_vocabulary()
    assert again.get_config() == tokenizer.get_config()
    assert token_ids(again, texts_for(kind)) == token_ids(tokenizer, texts_for(kind))


def test_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) == tokenizer.vocabulary_size()
    assert [tokenizer.token_to_id(token) for token in vocabulary[4:]] == list(range(4, len(vocabulary)))
    assert [tokenizer.id_to_token(i) for i in range(len(vocabulary))] == vocabulary
    assert isinstance(tokenizer, keras_nlp.tokenizers.Tokenizer)
    with pytest.raises(ValueError, match="`id` must"):
        tokenizer.id_to_token(len(vocabulary))


def test_training_is_reproducible(tokenizer, kind):
    assert TRAINERS[kind]().get_vocabulary() == tokenizer.get_vocabulary()


@pytest.mark.parametrize("train", [train_sentence_piece, train_word_piece])
def test_small_corpus_lowers_the_size(train):
    assert 4 < train(["a cat", "a rat"], 8000).vocabulary_size() < 30


@pytest.mark.parametrize("train", [train_sentence_piece, train_word_piece])
@pytest.mark.parametrize("size", [3, 20])
def test_size_too_small_for_the_characters(train, size):
    with pytest.raises(ValueError, match=rf"`vocabulary_size` must .*characters.*received {size}"):
        train(TEXTS, size)


@pytest.mark.parametrize("train", [train_sentence_piece, train_word_piece])
@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text(train, texts):
    with pytest.raises(ValueError, match="`texts` must hold at least one"):
        train(texts, 100)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("space", [" ", "\u00a0", "\u202f", "  "])
@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece"])
def test_spellings_of_one_text(tokenizers, kind, form, space):
    tokenizer = tokenizers[kind]
    text = unicodedata.normalize(form, TEXTS[1].replace(" ", space))
    assert token_ids(tokenizer, [text]) == token_ids(tokenizer, [TEXTS[1]])


def test_lowercase_word_piece():
    tokenizer = train_word_piece(TEXTS, 300, lowercase=True)
    assert token_ids(tokenizer, ["ein MÄDCHEN"]) == token_ids(tokenizer, ["Ein mädchen"])
    assert detokenize(tokenizer, token_ids(tokenizer, [TEXTS[0]])) == [TEXTS[0].lower()]


def test_subwords_are_joined():
    tokenizer = train_subwords(["ein spiel@@ haus aus hol@@ z@@"])
    cases = ["ein spiel@@ haus", "hol@@ z@@", "spiel@@", "ein  \thaus\x0b", "ein\u00a0haus"]
    joined = ["ein spielhaus", "holz", "spiel", "ein haus", "<unknown>"]
    for text, result in zip(cases, joined, strict=True):
        assert detokenize(tokenizer, token_ids(tokenizer, [text])) == [result]


def test_subword_vocabulary_is_sorted_by_frequency():
    tokenizer = train_subwords(["b a c", "c b", "c d <pad>"])
    assert tokenizer.get_vocabulary() == [*SubwordTokenizer.SPECIAL, "c", "b", "a", "d"]
    assert train_subwords(["c d", "c b", "b a c"], vocabulary_size=6).get_vocabulary()[4:] == ["c", "b"]


@pytest.mark.parametrize(
    "vocabulary, message",
    [
        (["a", "b"], "must begin with"),
        ([*SubwordTokenizer.SPECIAL, "a", "b", "a"], r"repeat a subword; received \['a'\]"),
    ],
)
def test_bad_subword_vocabulary(vocabulary, message):
    with pytest.raises(ValueError, match=message):
        SubwordTokenizer(vocabulary)


def test_subwords_without_a_vocabulary_say_so():
    with pytest.raises(ValueError, match="no vocabulary yet"):
        SubwordTokenizer().tokenize(["a"])


def test_word_piece_is_registered_as_ours():
    assert keras.saving.get_registered_name(WordPieceTokenizer) == "keras_transformer>WordPieceTokenizer"
