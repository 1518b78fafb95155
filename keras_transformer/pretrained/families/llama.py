"""LLaMA and Code Llama: pre-norm decoder with rotary positions, RMS norm, SwiGLU and grouped queries."""

import keras

from keras_transformer.layers import DecoderBlock, FeedForward, MultiHeadSelfAttention
from keras_transformer.pretrained.families import parts
from keras_transformer.pretrained.family import Family

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def attention(fields, **options):
    """The attention of LLaMA and its kin, with what a family does otherwise."""
    heads, dim = fields.need("num_attention_heads"), fields.need("hidden_size")
    return MultiHeadSelfAttention(
        heads,
        head_dim=fields.take("head_dim", default=dim // heads),
        num_key_value_heads=fields.take("num_key_value_heads", default=heads),
        causal=True,
        position=parts.rotary(fields),
        dropout=fields.take("attention_dropout", default=0.0),
        **{"use_bias": False, **options},
    )


def feed_forward(fields, use_bias=False, name="hidden_act", default="silu"):
    activation = parts.activation(fields, name, default)
    return FeedForward(fields.need("intermediate_size"), activation, gated=True, use_bias=use_bias)


def norm(fields, name="decoder_norm"):
    return keras.layers.RMSNormalization(epsilon=fields.take("rms_norm_eps", default=1e-6), name=name)


def decoder(fields, block, tied=False, scale=None, soft_cap=None):
    """LLaMA and its kin: `block` makes the block of a number; embeddings are multiplied by `scale`."""
    fields.ignore("pad_token_id")
    return parts.LanguageModel(
        fields.need("vocab_size"),
        fields.need("hidden_size"),
        [block(i) for i in range(fields.need("num_hidden_layers"))],
        norm(fields),
        embed=None if scale is None else lambda x, mask: keras.layers.Rescaling(scale, name="embedding_scale")(x),
        soft_cap=soft_cap,
        tied=fields.take("tie_word_embeddings", default=tied),
    )


def block(fields, i, attention, feed_forward, **options):
    return DecoderBlock(attention, feed_forward, norm=norm(fields), name=f"decoder_block_{i}", **options)


def language_model(fields):
    fields.fill(DEFAULTS)
    attention_bias, mlp_bias = fields.take("attention_bias", default=False), fields.take("mlp_bias", default=False)
    fields.ignore("pretraining_tp")

    def llama_block(i):
        return block(fields, i, attention(fields, use_bias=attention_bias), feed_forward(fields, use_bias=mlp_bias))

    return decoder(fields, llama_block)


WEIGHTS = {
    "embedding": "embed_tokens",
    "decoder_block_{i}/self_attention_norm": "layers.{i}.input_layernorm",
    "decoder_block_{i}/self_attention/query": "layers.{i}.self_attn.q_proj",
    "decoder_block_{i}/self_attention/key": "layers.{i}.self_attn.k_proj",
    "decoder_block_{i}/self_attention/value": "layers.{i}.self_attn.v_proj",
    "decoder_block_{i}/self_attention/output": "layers.{i}.self_attn.o_proj",
    "decoder_block_{i}/feed_forward_norm": "layers.{i}.post_attention_layernorm",
    "decoder_block_{i}/feed_forward/gate": "layers.{i}.mlp.gate_proj",
    "decoder_block_{i}/feed_forward/up": "layers.{i}.mlp.up_proj",
    "decoder_block_{i}/feed_forward/down": "layers.{i}.mlp.down_proj",
    "decoder_norm": "norm",
}


def causal_family(name, language_model, weights=WEIGHTS):
    """The family whose files are spelled as LLaMA's are; `language_model` makes a `LanguageModel` from fields."""

    def build(fields, task, stored):
        return language_model(fields).model(fields.family, task)

    return Family(
        build=build,
        language_model=language_model,
        tasks={f"{name}Model": "bare", f"{name}ForCausalLM": "causal_lm"},
        weights=weights,
        heads={"logits": "lm_head"},
        prefix="model.",
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )


FAMILY = causal_family("Llama", language_model)
