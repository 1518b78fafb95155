"""The text encoder of CLIP: causal and pre-norm, pooled where the text ends."""

import keras
from keras import ops

from keras_transformer.layers import MultiHeadSelfAttention, PositionalEmbedding
from keras_transformer.pretrained.families import parts, towers
from keras_transformer.pretrained.family import Family


def blocks(fields, x, prefix, num_heads=12, hidden_dim=3072, causal=False, mask=None):
    """What goes into and comes out of the blocks of either of CLIP's encoders, in a list."""
    # Older configurations list all that any model might have.
    fields.ignore(
        "add_cross_attention cross_attention_hidden_size decoder_start_token_id dropout is_decoder pruned_heads "
        "tie_word_embeddings"
    )
    attention = MultiHeadSelfAttention(
        fields.take("num_attention_heads", default=num_heads),
        causal=causal,
        dropout=fields.take("attention_dropout", default=0.0),
    )
    return towers.encoder_blocks(fields, x, attention, hidden_dim, "quick_gelu", 1e-5, prefix=prefix, mask=mask)


def encode(fields):
    """From text to `(inputs, hidden states [B, T, dim], pooled [B, dim])`."""
    fields.ignore("pad_token_id projection_dim")
    token_ids, padding_mask, mask = parts.text_inputs()
    size, dim = fields.take("vocab_size", default=49408), towers.dim(fields, 512)
    x = parts.keeps_mask(keras.layers.Embedding(size, dim, name="text_embedding"))(token_ids)
    longest = fields.take("max_position_embeddings", default=77)
    x = PositionalEmbedding("learned", longest, name="text_position")(x, mask=mask)
    x = blocks(fields, x, "text_", 8, 2048, causal=True, mask=mask)[-1]
    x = towers.norm(fields, 1e-5, "text_norm")(x)
    end = ops.reshape(_end(token_ids, fields), (-1, 1, 1))
    return [token_ids, padding_mask], x, ops.take_along_axis(x, end, axis=1)[:, 0]


def _end(token_ids, fields):
    """Where each text ends, [B]: at the first end token."""
    end_id = fields.take("eos_token_id", default=49407)
    if not isinstance(end_id, int):
        raise ValueError(f"`eos_token_id` of a {fields.family} checkpoint must be one number here; received {end_id}.")
    if end_id == 2:  # The first configurations have this wrong: what they mean is the last token of the vocabulary.
        return ops.argmax(token_ids, axis=-1)
    return ops.argmax(ops.cast(ops.equal(token_ids, end_id), "int32"), axis=-1)


def project(x, dim, name):
    return keras.layers.Dense(dim, use_bias=False, name=name)(x)


def build(fields, task, stored):
    inputs, hidden_states, pooled = encode(fields)
    outputs = {"hidden_states": hidden_states}
    if task == "bare":
        outputs["pooled"] = pooled
    else:
        outputs["text_embedding"] = project(pooled, fields.take("projection_dim", default=512), "text_projection")
    return keras.Model(inputs, outputs, name=fields.family)


def block_weights(prefix):
    return {
        f"{prefix}encoder_block_{{i}}/self_attention_norm": "encoder.layers.{i}.layer_norm1",
        f"{prefix}encoder_block_{{i}}/self_attention/query": "encoder.layers.{i}.self_attn.q_proj",
        f"{prefix}encoder_block_{{i}}/self_attention/key": "encoder.layers.{i}.self_attn.k_proj",
        f"{prefix}encoder_block_{{i}}/self_attention/value": "encoder.layers.{i}.self_attn.v_proj",
        f"{prefix}encoder_block_{{i}}/self_attention/output": "encoder.layers.{i}.self_attn.out_proj",
        f"{prefix}encoder_block_{{i}}/feed_forward_norm": "encoder.layers.{i}.layer_norm2",
        f"{prefix}encoder_block_{{i}}/feed_forward/up": "encoder.layers.{i}.mlp.fc1",
        f"{prefix}encoder_block_{{i}}/feed_forward/down": "encoder.layers.{i}.mlp.fc2",
    }


FAMILY = Family(
    build=build,
    tasks={"CLIPTextModel": "bare", "CLIPTextModelWithProjection": "projection"},
    weights={
        "text_embedding": "embeddings.token_embedding",
        "text_position": "embeddings.position_embedding",
        **block_weights("text_"),
        "text_norm": "final_layer_norm",
    },
    heads={"text_projection": "text_projection"},
    prefix="text_model.",
)
