"""GPT-2: pre-norm decoder with learned positions; files keep kernels as (in, out), and query, key, value as one."""

import keras

from keras_transformer.layers import DecoderBlock, Dropout, FeedForward, MultiHeadSelfAttention, PositionalEmbedding
from keras_transformer.pretrained.families import parts
from keras_transformer.pretrained.family import Family
from keras_transformer.pretrained.weights import Stored, packed


def build(fields, task, stored):
    fields.only("add_cross_attention", False)
    # `reorder_and_upcast_attn` computes scores in float32, as is done here in any case. Summaries are other heads.
    fields.ignore(
        "reorder_and_upcast_attn pad_token_id n_ctx summary_type summary_use_proj summary_activation "
        "summary_proj_to_labels summary_first_dropout"
    )
    size, dim = fields.take("vocab_size", default=50257), fields.take("n_embd", "hidden_size", default=768)
    heads = fields.take("n_head", "num_attention_heads", default=12)
    scale = (dim // heads) ** -0.5 if fields.take("scale_attn_weights", default=True) else 1.0
    by_depth = fields.take("scale_attn_by_inverse_layer_idx", default=False)
    dropout = fields.take("resid_pdrop", default=0.1)
    attention_dropout = fields.take("attn_pdrop", default=0.1)
    hidden_dim = fields.take("n_inner", default=4 * dim)
    activation = parts.activation(fields, "activation_function", "gelu_new")

    def norm(name=None):
        return keras.layers.LayerNormalization(epsilon=fields.take("layer_norm_epsilon", default=1e-5), name=name)

    length = fields.take("n_positions", "max_position_embeddings", default=1024)
    position = PositionalEmbedding("learned", length, name="position")
    embedding_dropout = Dropout(fields.take("embd_pdrop", default=0.1), name="embedding_dropout")

    def block(i):
        attention = MultiHeadSelfAttention(
            heads, causal=True, scale=scale / (i + 1) if by_depth else scale, dropout=attention_dropout
        )
        feed_forward = FeedForward(hidden_dim, activation)
        return DecoderBlock(attention, feed_forward, norm=norm(), dropout=dropout, name=f"decoder_block_{i}")

    language_model = parts.LanguageModel(
        size,
        dim,
        [block(i) for i in range(fields.take("n_layer", "num_hidden_layers", default=12))],
        norm("decoder_norm"),
        embed=lambda x, mask: embedding_dropout(position(x, mask=mask)),
        tied=fields.take("tie_word_embeddings", default=True),
    )
    return language_model.model(fields.family, task)


def _untransposed(name):
    return Stored(name, transposed=False)


FAMILY = Family(
    build=build,
    tasks={"GPT2Model": "bare", "GPT2LMHeadModel": "causal_lm"},
    weights={
        "embedding": "wte",
        "position": "wpe",
        "decoder_block_{i}/self_attention_norm": "h.{i}.ln_1",
        "decoder_block_{i}/self_attention/query": packed("h.{i}.attn.c_attn", 0, axis=-1, transposed=False),
        "decoder_block_{i}/self_attention/key": packed("h.{i}.attn.c_attn", 1, axis=-1, transposed=False),
        "decoder_block_{i}/self_attention/value": packed("h.{i}.attn.c_attn", 2, axis=-1, transposed=False),
        "decoder_block_{i}/self_attention/output": _untransposed("h.{i}.attn.c_proj"),
        "decoder_block_{i}/feed_forward_norm": "h.{i}.ln_2",
        "decoder_block_{i}/feed_forward/up": _untransposed("h.{i}.mlp.c_fc"),
        "decoder_block_{i}/feed_forward/down": _untransposed("h.{i}.mlp.c_proj"),
        "decoder_norm": "ln_f",
    },
    heads={"logits": "lm_head"},
    prefix="transformer.",
    tied={"lm_head.weight": "transformer.wte.weight"},
    buffers=(r"h\.\d+\.attn\.(bias|masked_bias)",),
)
