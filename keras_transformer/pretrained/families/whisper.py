"""Whisper: two convolutions and an encoder over the log-mel frames of 30 seconds, and a decoder of text."""

import keras

from keras_transformer.layers import (
    CrossAttention,
    DecoderBlock,
    Dropout,
    EncoderBlock,
    FeedForward,
    MultiHeadSelfAttention,
    PositionalEmbedding,
)
from keras_transformer.pretrained.families import parts
from keras_transformer.pretrained.families.sequence_to_sequence import WEIGHTS, embedding, output_projection
from keras_transformer.pretrained.family import Family


def build(fields, task, stored):
    # These act in training alone, or belong to classifiers or to the timing of words.
    fields.ignore(
        "encoder_layerdrop decoder_layerdrop apply_spec_augment mask_time_prob mask_time_length mask_time_min_masks "
        "mask_feature_prob mask_feature_length mask_feature_min_masks use_weighted_layer_sum classifier_proj_size "
        "median_filter_width pad_token_id decoder_start_token_id"
    )
    # Which transformers reads and never multiplies by.
    fields.ignore("scale_embedding")
    fields.only("is_decoder", False)
    dim = fields.take("d_model", "hidden_size", default=384)
    dropout = fields.take("dropout", default=0.0)
    target_embedding = embedding(fields.take("vocab_size", default=51865), dim)
    encoder_blocks, decoder_blocks = _encoder_blocks(fields, dropout), _decoder_blocks(fields, dropout)
    length = fields.take("max_source_positions", default=1500)
    target_length = fields.take("max_target_positions", default=448)
    tied = fields.take("tie_word_embeddings", default=True)

    # There is no mask: shorter speech is filled up with silence, which the encoder was trained to hear.
    features = keras.Input((2 * length, fields.take("num_mel_bins", default=80)), name="features")
    target_ids = keras.Input((None,), dtype="int32", name="target_ids")
    x = _convolutions(features, dim)
    x = PositionalEmbedding("learned", length, trainable=False, name="encoder_position")(x)
    context = Dropout(dropout, name="encoder_embedding_dropout")(x)
    for block in encoder_blocks:
        context = block(context)
    context = _norm("encoder_norm")(context)
    x = PositionalEmbedding("learned", target_length, name="decoder_position")(target_embedding(target_ids))
    x = Dropout(dropout, name="decoder_embedding_dropout")(x)
    for block in decoder_blocks:
        x = block(x, context)
    x = _norm("decoder_norm")(x)
    if task == "bare":
        outputs = {"hidden_states": x, "context": context}
    else:
        outputs = output_projection(target_embedding, tied)(x)
    return keras.Model([features, target_ids], outputs, name=fields.family)


def _convolutions(features, dim):
    """Frames `[B, 2 * T, mels]` as `[B, T, dim]`; their activation is the same whatever that of the blocks is."""
    x = keras.layers.Conv1D(dim, 3, padding="same", activation="gelu", name="convolution_0")(features)
    # Not "same": with a stride, that pads the end alone.
    x = keras.layers.ZeroPadding1D(1, name="convolution_padding")(x)
    return keras.layers.Conv1D(dim, 3, strides=2, activation="gelu", name="convolution_1")(x)


def _norm(name=None):
    return keras.layers.LayerNormalization(epsilon=1e-5, name=name)


def _encoder_blocks(fields, dropout):
    heads = fields.take("encoder_attention_heads", "num_attention_heads", default=6)
    attention = MultiHeadSelfAttention(heads, **_attention_options(fields))
    feed_forward = _feed_forward(fields, fields.take("encoder_ffn_dim", default=1536))
    return [
        EncoderBlock(attention, feed_forward, norm=_norm(), dropout=dropout, name=f"encoder_block_{i}")
        for i in range(fields.take("encoder_layers", "num_hidden_layers", default=4))
    ]


def _decoder_blocks(fields, dropout):
    heads, options = fields.take("decoder_attention_heads", default=6), _attention_options(fields)
    attention = MultiHeadSelfAttention(heads, causal=True, **options)
    feed_forward = _feed_forward(fields, fields.take("decoder_ffn_dim", default=1536))
    cross_attention = CrossAttention(heads, **options)
    return [
        DecoderBlock(attention, feed_forward, cross_attention, norm=_norm(), dropout=dropout, name=f"decoder_block_{i}")
        for i in range(fields.take("decoder_layers", default=4))
    ]


def _attention_options(fields):
    # A bias of the keys would add the same to all scores of a query.
    return {"use_bias": ["query", "value", "output"], "dropout": fields.take("attention_dropout", default=0.0)}


def _feed_forward(fields, hidden_dim):
    activation = parts.activation(fields, "activation_function", "gelu")
    return FeedForward(hidden_dim, activation, dropout=fields.take("activation_dropout", default=0.0))


FAMILY = Family(
    build=build,
    tasks={"WhisperModel": "bare", "WhisperForConditionalGeneration": "seq2seq"},
    weights={
        **WEIGHTS,
        "convolution_0": "encoder.conv1",
        "convolution_1": "encoder.conv2",
        "encoder_position": "encoder.embed_positions",
        "encoder_norm": "encoder.layer_norm",
        "embedding": "decoder.embed_tokens",
        "decoder_position": "decoder.embed_positions",
        "decoder_norm": "decoder.layer_norm",
    },
    heads={"logits": "proj_out"},
    prefix="model.",
    tied={"proj_out.weight": "model.decoder.embed_tokens.weight"},
)
