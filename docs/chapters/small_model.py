"""The model of the chapters: small enough to follow by hand, with weights that are multiples of a quarter."""

import keras
import numpy as np

import keras_transformer as kt

WORDS = ["the", "bank", "river", "money"]

# What the four features of an embedding mean: an article, a word with two meanings, water, money.
EMBEDDINGS = [
    [1, 0, 0, 0],  # the
    [0, 1, 0.25, 0.25],  # bank
    [0, 0, 1, 0],  # river
    [0, 0, 0, 1],  # money
]

# From features to two heads of four numbers each. Head 0 asks of a bank which one it is; head 1 of an article what it
# stands before.
QUERY = [
    [0, 0, 0, 0, 2, 0, 0, 0],
    [2, 2, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
]
KEY = [
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 2, 0, 0, 0],
    [2, 0, 0, 0, 1, 0, 0, 0],
    [0, 2, 0, 0, 1, 0, 0, 0],
]
VALUE = [
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 1, 0, 0, 0],
    [1, 0, 0, 0, 0, 0, 0, 0],
    [0, 1, 0, 0, 0, 0, 0, 0],
]
# Back to features: what head 0 found is water or money, what head 1 found makes an article one of something.
OUTPUT = [
    [0, 0, 1, 0],
    [0, 0, 0, 1],
    [0, 0, 0, 0],
    [0, 0, 0, 0],
    [0, 0.5, 0, 0],
    [0, 0, 0, 0],
    [0, 0, 0, 0],
    [0, 0, 0, 0],
]


def small_model():
    """An embedding, two heads of attention, and a residual connection around these."""
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(4, 4, name="embedding")(tokens)
    attended = kt.layers.MultiHeadSelfAttention(2, head_dim=4, use_bias=False, name="attention")(x)
    model = keras.Model(tokens, keras.layers.Add(name="residual")([x, attended]))
    tables = {"embedding": EMBEDDINGS, "query": QUERY, "key": KEY, "value": VALUE, "output": OUTPUT}
    for variable in model.weights:
        part = variable.path.split("/")[-2]
        variable.assign(np.array(tables[part], "float32"))
    return model


def ids(sentence):
    """The numbers of the words, as a batch of one."""
    return np.array([[WORDS.index(word) for word in sentence.split()]], "int32")


def trace_of(sentence):
    return kt.inspection.trace(small_model(), ids(sentence), sentence.split())
