"""The encoder of BERT and its kin, which differ in the spelling of sizes and in their heads."""

import keras
from keras import ops

from keras_transformer.layers import (
    Bias,
    Dropout,
    EncoderBlock,
    FeedForward,
    MultiHeadSelfAttention,
    PositionalEmbedding,
)
from keras_transformer.pretrained.families import parts


class Encoder:
    """A BERT-like encoder, step by step, with the heads that may stand on it.

    Attributes:
        inputs: list of symbolic tensors.
        hidden_states: symbolic tensor [B, T, dim], once `encode` was called.
    """

    def __init__(self, fields, dim, depth, num_heads, hidden_dim, activation, dropout, attention_dropout, epsilon):
        self.fields = fields
        self.dim = dim
        self.depth = depth
        self.activation = activation
        self.dropout = dropout
        self.epsilon = epsilon
        self._attention = MultiHeadSelfAttention(num_heads, dropout=attention_dropout)
        self._feed_forward = FeedForward(hidden_dim, activation)
        size = fields.take("vocab_size", default=30522)
        self._embedding = parts.keeps_mask(keras.layers.ReversibleEmbedding(size, dim, name="embedding"))

    def norm(self, name=None):
        return keras.layers.LayerNormalization(epsilon=self.epsilon, name=name)

    def encode(self, longest, offset=0, segments=0):
        """From token ids to hidden states: `longest` learned positions from `offset` on, `segments` kinds of text."""
        token_ids, padding_mask, mask = parts.text_inputs()
        self.inputs = [token_ids, padding_mask]
        x = self._embedding(token_ids)
        if segments:
            if segments > 1:
                segment_ids = keras.Input((None,), dtype="int32", name="segment_ids")
                self.inputs.append(segment_ids)
            else:  # One kind alone is added to all tokens.
                segment_ids = ops.zeros_like(token_ids)
            x = x + keras.layers.Embedding(segments, self.dim, name="segment_embedding")(segment_ids)
        x = PositionalEmbedding("learned", longest, offset=offset, name="position")(x, mask=mask)
        x = self.drop(self.norm("embedding_norm")(x), self.dropout, "embedding_dropout")
        for i in range(self.depth):
            x = EncoderBlock(
                self._attention,
                self._feed_forward,
                norm=self.norm(),
                norm_position="post",
                dropout=self.dropout,
                name=f"encoder_block_{i}",
            )(x, mask=mask)
        self.hidden_states = x

    def token_logits(self, activation=None):
        """A layer on each token, and the embedding as output projection, with a bias beside it."""
        x = keras.layers.Dense(self.dim, activation or self.activation, name="transform")(self.hidden_states)
        x = self.norm("transform_norm")(x)
        return Bias(name="logits_bias")(self._embedding(x, reverse=True))

    def dense(self, x, units, name, activation=None):
        return keras.layers.Dense(units, activation, name=name)(x)

    def first_token(self):
        return self.hidden_states[:, 0]

    def drop(self, x, rate, name):
        return Dropout(rate, name=name)(x)

    def labels(self, x, dropout, name="labels"):
        """Dropout and one score for each label."""
        x = self.drop(x, dropout, "labels_dropout")
        return self.dense(x, parts.number_of_labels(self.fields), name)

    def answers(self, dropout=0.0):
        """Two scores for each token: whether an answer begins and ends there."""
        x = self.drop(self.hidden_states, dropout, "answers_dropout")
        return self.dense(x, 2, "answers")

    def model(self, outputs):
        return keras.Model(self.inputs, outputs, name=self.fields.family)
