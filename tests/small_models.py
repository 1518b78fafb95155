"""Small models whose logits are far apart, so that no rounding decides between two tokens."""

import keras
import numpy as np

import keras_transformer as kt
from keras_transformer.layers import (
    AlibiBias,
    DecoderBlock,
    EncoderBlock,
    MultiHeadSelfAttention,
    PositionalEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
)

VOCABULARY = 24


def scatter_weights(model, spread=0.3, seed=0):
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(keras.ops.convert_to_numpy(variable) + spread * random.normal(size=variable.shape))
    return model


def seq2seq(**options):
    """The paper's model, from `kt.models`."""
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "hidden_dim": 24, **options}
    return scatter_weights(kt.models.transformer(VOCABULARY, VOCABULARY, **sizes))


def two_encoders():
    """A model by hand: two encoders, one nested as a model of its own, that feed one decoder."""
    first = keras.Input((None,), dtype="int32", name="first_ids")
    second = keras.Input((None, 6), name="second_features")
    target = keras.Input((None,), dtype="int32", name="target_ids")
    nested_input = keras.Input((None, 6))
    nested = keras.Model(nested_input, EncoderBlock(2, 24)(keras.layers.Dense(16)(nested_input)), name="tower")
    words = EncoderBlock(2, 24)(keras.layers.Embedding(VOCABULARY, 16, mask_zero=True)(first))
    features = nested(second)
    x = PositionalEmbedding()(keras.layers.Embedding(VOCABULARY, 16, mask_zero=True)(target))
    x = DecoderBlock(2, 24, cross_attention=4)(x, words)
    x = DecoderBlock(MultiHeadSelfAttention(4, num_key_value_heads=2, causal=True), 24, cross_attention=2)(x, features)
    return scatter_weights(keras.Model([first, second, target], keras.layers.Dense(VOCABULARY, name="logits")(x)))


def decoder_only(position=None, learned=None, mask_zero=False, **attention):
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(VOCABULARY, 16, mask_zero=mask_zero)(tokens)
    if learned:
        x = PositionalEmbedding("learned", max_length=learned)(x)
    elif position is None:
        x = PositionalEmbedding()(x)
    for _ in range(2):
        x = DecoderBlock(MultiHeadSelfAttention(4, causal=True, position=position, **attention), 24)(x)
    logits = keras.layers.Dense(VOCABULARY)(keras.layers.LayerNormalization()(x))
    return scatter_weights(keras.Model(tokens, logits))


def shared_layer():
    """One block called twice: two caches under one path."""
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    block = DecoderBlock(2, 24)
    x = PositionalEmbedding()(keras.layers.Embedding(VOCABULARY, 16)(tokens))
    return scatter_weights(keras.Model(tokens, keras.layers.Dense(VOCABULARY)(block(block(x)))))


def shared_bias():
    """T5's way: one relative bias for all blocks, as a tensor of the graph."""
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(VOCABULARY, 16)(tokens)
    bias = RelativePositionBias(2, num_buckets=8, max_distance=16, bidirectional=False)(x)
    for _ in range(2):
        x = DecoderBlock(2, 24)(x, attention_bias=bias)
    return scatter_weights(keras.Model(tokens, keras.layers.Dense(VOCABULARY)(x)))


MODELS = {
    "transformer": seq2seq,
    "transformer, pre-norm, shared embedding": lambda: seq2seq(norm_position="pre", shared_embedding=True),
    "transformer, separate output": lambda: seq2seq(tied_output=False, norm_position="sandwich"),
    "two encoders by hand": two_encoders,
    "sinusoidal": decoder_only,
    "learned": lambda: decoder_only(learned=40),
    "rotary, grouped": lambda: decoder_only(RotaryEmbedding(), num_key_value_heads=2),
    "rotary, dynamic": lambda: decoder_only(
        RotaryEmbedding(scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 40})
    ),
    "alibi, window": lambda: decoder_only(AlibiBias(4), sliding_window=3),
    "query-key norm, multi-query": lambda: decoder_only(
        query_key_norm=keras.layers.RMSNormalization(), num_key_value_heads=1, mask_zero=True
    ),
    "one block twice": shared_layer,
    "shared relative bias": shared_bias,
}


def inputs_for(model, rows, seed=1):
    """Source inputs for a model: ids of different lengths padded with 0, or features."""
    random = np.random.default_rng(seed)
    inputs = {}
    for x in model.inputs:
        if x.name in ("source_ids", "first_ids"):
            ids = random.integers(3, VOCABULARY, (rows, 7))
            ids[np.arange(7)[None] >= random.integers(2, 8, (rows, 1))] = 0
            inputs[x.name] = ids
        elif x.name == "second_features":
            inputs[x.name] = random.normal(size=(rows, 5, 6)).astype("float32")
    return inputs


def token_input(model):
    return next(x.name for x in model.inputs if x.name in ("target_ids", "token_ids"))


def logits_of(model, sources, tokens, length=12):
    """The model called on everything at once, without any cache.

    More tokens fill the rows up to one length, which is compiled once: causal attention sees none of them.
    """
    tokens = np.asarray(tokens, "int32")
    filled = np.pad(tokens, ((0, 0), (0, max(length - tokens.shape[1], 0))), constant_values=3)
    feed = {**sources, token_input(model): filled}
    return model.predict_on_batch([feed[x.name] for x in model.inputs])[:, : tokens.shape[1]]


def row_of(sources, row):
    return {name: x[row : row + 1] for name, x in sources.items()}


def greedy_by_hand(model, sources, prompt, count, end_id=None, length=12):
    """Greedy tokens after one prompt, everything computed anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model, sources, [tokens], length)[0, -1].argmax()))
        if tokens[-1] == end_id:
            break
    new = tokens[len(prompt) :]
    return new + [0] * (count - len(new))
