"""Gemma 2: Gemma with norms on both sides of a sublayer, capped scores and logits, and every other layer windowed."""

from keras_transformer.layers import SoftCap
from keras_transformer.pretrained.families import gemma, llama

DEFAULTS = {
    **gemma.DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def language_model(fields):
    fields.fill(DEFAULTS)
    # Files repeat the activation under its earlier name, which is not read.
    fields.ignore("hidden_act")
    window = fields.nullable("sliding_window", 4096)
    score_cap = fields.nullable("attn_logit_softcapping", 50.0)
    scale = fields.take("query_pre_attn_scalar", default=256) ** -0.5
    slides = fields.take("layer_types")

    def block(i):
        windowed = i % 2 == 0 if slides is None else slides[i] == "sliding_attention"
        attention = gemma.attention(
            fields,
            scale=scale,
            sliding_window=window if windowed else None,
            softmax=None if score_cap is None else SoftCap(score_cap),
        )
        feed_forward = gemma.feed_forward(fields, "hidden_activation")
        return llama.block(fields, i, attention, feed_forward, norm_position="sandwich")

    return gemma.decoder(fields, block, soft_cap=fields.nullable("final_logit_softcapping", 30.0))


WEIGHTS = {
    **llama.WEIGHTS,
    "decoder_block_{i}/self_attention_post_norm": "layers.{i}.post_attention_layernorm",
    "decoder_block_{i}/feed_forward_norm": "layers.{i}.pre_feedforward_layernorm",
    "decoder_block_{i}/feed_forward_post_norm": "layers.{i}.post_feedforward_layernorm",
}

FAMILY = gemma.causal_family("Gemma2", language_model, WEIGHTS)
