"""Encoder-decoder models: their inputs and outputs, and the post-norm transformer that BART and Marian share."""

import functools

import keras
from keras import ops

from keras_transformer.layers import (
    Bias,
    CrossAttention,
    DecoderBlock,
    Dropout,
    EncoderBlock,
    FeedForward,
    MultiHeadSelfAttention,
    PositionalEmbedding,
)
from keras_transformer.pretrained.families import parts


def sequence_to_sequence(fields, task, encode, decode, logits):
    """A model of source and target tokens.

    Args:
        fields: `Fields`.
        task: `"seq2seq"` or `"bare"`.
        encode: function of the source's token ids and mask that returns the context.
        decode: function of the target's token ids, the context and its mask that returns hidden states.
        logits: function of the hidden states.
    """
    source_ids = keras.Input((None,), dtype="int32", name="source_ids")
    source_padding_mask = keras.Input((None,), dtype="int32", name="source_padding_mask")
    target_ids = keras.Input((None,), dtype="int32", name="target_ids")
    mask = ops.not_equal(source_padding_mask, 0)
    context = encode(source_ids, mask)
    hidden_states = decode(target_ids, context, mask)
    outputs = {"hidden_states": hidden_states, "context": context} if task == "bare" else logits(hidden_states)
    return keras.Model([source_ids, source_padding_mask, target_ids], outputs, name=fields.family)


def embedding(size, dim, name="embedding"):
    return parts.keeps_mask(keras.layers.ReversibleEmbedding(size, dim, name=name))


def output_projection(embedding, tied=True):
    """From hidden states to logits: by the target's embedding, or by a kernel of its own."""
    if tied:
        return functools.partial(embedding, reverse=True)
    return keras.layers.Dense(embedding.input_dim, use_bias=False, name="logits")


def post_norm_transformer(fields, task, stored, embeddings, position, embedding_norm=False, tied=True):
    """The encoder and the decoder of BART and Marian.

    Args:
        fields: `Fields`.
        task: `"seq2seq"` or `"bare"`.
        stored: set of the names in the file: without a bias of the logits there, there is none.
        embeddings: of the source and of the target: two layers, or twice the same.
        position: dict of arguments of `PositionalEmbedding`.
        embedding_norm: boolean. Whether a norm follows the positions.
        tied: boolean. Whether the target's embedding is also the output projection.
    """
    # Layers are dropped in training alone, and labels are of other heads. Whether there is a bias of the logits is for
    # the file to say, and positions begin where they do, whatever the older fields hold.
    fields.ignore(
        "encoder_layerdrop decoder_layerdrop pad_token_id decoder_start_token_id classifier_dropout classif_dropout "
        "num_labels _num_labels add_bias_logits extra_pos_embeddings force_bos_token_to_be_generated"
    )
    fields.only("is_decoder", False)
    fields.only("normalize_before", False)
    fields.only("add_final_layer_norm", False)
    fields.only("normalize_embedding", embedding_norm)
    fields.only("static_position_embeddings", position["kind"] == "sinusoidal")
    dropout = fields.take("dropout", default=0.1)
    attention_dropout = fields.take("attention_dropout", default=0.0)
    activation_dropout = fields.take("activation_dropout", default=0.0)
    activation = parts.activation(fields, "activation_function", "gelu")
    length = fields.take("max_position_embeddings", default=1024)
    scale = embeddings[0].output_dim ** 0.5 if fields.take("scale_embedding", default=False) else 1.0
    sizes = {
        "encoder": (
            fields.take("encoder_layers", "num_hidden_layers", default=12),
            fields.take("encoder_attention_heads", "num_attention_heads", default=16),
            fields.take("encoder_ffn_dim", default=4096),
        ),
        "decoder": (
            fields.take("decoder_layers", default=12),
            fields.take("decoder_attention_heads", default=16),
            fields.take("decoder_ffn_dim", default=4096),
        ),
    }

    def norm(name=None):
        return keras.layers.LayerNormalization(epsilon=1e-5, name=name)

    def embed(side, embedding, token_ids, mask=None):
        x = embedding(token_ids)
        x = PositionalEmbedding(max_length=length, scale=scale, name=f"{side}_position", **position)(x, mask=mask)
        x = norm(f"{side}_embedding_norm")(x) if embedding_norm else x
        return Dropout(dropout, name=f"{side}_embedding_dropout")(x)

    def blocks(side, kind):
        depth, heads, hidden_dim = sizes[side]
        attention = MultiHeadSelfAttention(heads, causal=side == "decoder", dropout=attention_dropout)
        feed_forward = FeedForward(hidden_dim, activation, dropout=activation_dropout)
        options = {"norm": norm(), "norm_position": "post", "dropout": dropout}
        if side == "decoder":
            options["cross_attention"] = CrossAttention(heads, dropout=attention_dropout)
        return [kind(attention, feed_forward, name=f"{side}_block_{i}", **options) for i in range(depth)]

    def encode(source_ids, mask):
        x = embed("encoder", embeddings[0], source_ids, mask)
        for block in blocks("encoder", EncoderBlock):
            x = block(x, mask=mask)
        return x

    def decode(target_ids, context, mask):
        x = embed("decoder", embeddings[1], target_ids)
        for block in blocks("decoder", DecoderBlock):
            x = block(x, context, context_mask=mask)
        return x

    def logits(x):
        x = output_projection(embeddings[1], tied)(x)
        return Bias(name="logits_bias")(x) if "final_logits_bias" in stored else x

    return sequence_to_sequence(fields, task, encode, decode, logits)


def _attention(ours, theirs, norm):
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    return {**{f"{ours}/{own}": f"{theirs}.{name}" for own, name in projections.items()}, f"{ours}_norm": norm}


SELF_ATTENTION = _attention("self_attention", "self_attn", "self_attn_layer_norm")
CROSS_ATTENTION = _attention("cross_attention", "encoder_attn", "encoder_attn_layer_norm")
FEED_FORWARD = {"feed_forward/up": "fc1", "feed_forward/down": "fc2", "feed_forward_norm": "final_layer_norm"}


def block_weights(side, *sublayers):
    """The names of the blocks of the encoder or the decoder."""
    names = {ours: theirs for sublayer in sublayers for ours, theirs in sublayer.items()}
    return {f"{side}_block_{{i}}/{ours}": f"{side}.layers.{{i}}.{theirs}" for ours, theirs in names.items()}


WEIGHTS = {
    **block_weights("encoder", SELF_ATTENTION, FEED_FORWARD),
    **block_weights("decoder", SELF_ATTENTION, CROSS_ATTENTION, FEED_FORWARD),
}
