"""gpt-oss: a decoder of experts with biases throughout, sinks in attention, and every other block windowed.

Files that keep the experts in MXFP4, as the released ones do, are read; what is saved are floats.
"""

import dataclasses

from keras_transformer.layers import AttentionSinks, ClampedSwiGLU
from keras_transformer.pretrained.families import llama
from keras_transformer.pretrained.families.mixtral import experts
from keras_transformer.pretrained.mxfp4 import Unpacked
from keras_transformer.pretrained.weights import exact

DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
LAYER_TYPES = ("sliding_attention", "full_attention")


def language_model(fields):
    _check_packing(fields)
    fields.fill(DEFAULTS)
    if fields.take("rope_parameters", "rope_scaling") is None:
        fields.fill({"rope_parameters": ROPE})
    # The activation is fixed, whatever `hidden_act` says; the other two repeat what other fields say.
    fields.ignore("hidden_act experts_per_token initial_context_length")
    heads, use_bias = fields.need("num_attention_heads"), fields.take("attention_bias", default=True)
    window = fields.nullable("sliding_window", 128)
    types = _layer_types(fields)
    alpha, limit = fields.take("swiglu_alpha", default=1.702), fields.take("swiglu_limit", default=7.0)

    def block(i):
        attention = llama.attention(
            fields,
            use_bias=use_bias,
            sliding_window=window if types[i] == "sliding_attention" else None,
            softmax=AttentionSinks(heads),
        )
        activation = ClampedSwiGLU(alpha, limit)
        feed_forward = experts(fields, 128, 4, activation=activation, use_bias=True, router_bias=True)
        return llama.block(fields, i, attention, feed_forward)

    return llama.decoder(fields, block)


def _layer_types(fields):
    count = fields.need("num_hidden_layers")
    types = fields.take("layer_types", default=[LAYER_TYPES[i % 2] for i in range(count)])
    if len(types) != count or not set(types) <= set(LAYER_TYPES):
        raise ValueError(
            f"`layer_types` of a gpt_oss checkpoint must name one of {LAYER_TYPES} for each of its {count} layers; "
            f"received {types}."
        )
    return types


def _check_packing(fields):
    method = fields.take("quantization_config", default={}).get("quant_method")
    if method not in (None, "mxfp4"):
        raise ValueError(
            f"`quantization_config.quant_method` of a gpt_oss checkpoint must be 'mxfp4' here; received {method!r}."
        )


def _taking_turns(name, index):
    """Gate and up stand in one tensor, column by column in turns."""
    return exact(name, part=(index, 2, -1), interleaved=True)


EXPERTS = "layers.{i}.mlp.experts"

FAMILY = dataclasses.replace(
    llama.causal_family(
        "GptOss",
        language_model,
        {
            **llama.WEIGHTS,
            "decoder_block_{i}/self_attention/softmax": exact("layers.{i}.self_attn.sinks"),
            "decoder_block_{i}/feed_forward/router": "layers.{i}.mlp.router",
            "decoder_block_{i}/feed_forward/gate": _taking_turns(f"{EXPERTS}.gate_up_proj", 0),
            "decoder_block_{i}/feed_forward/up": _taking_turns(f"{EXPERTS}.gate_up_proj", 1),
            "decoder_block_{i}/feed_forward/gate_bias": _taking_turns(f"{EXPERTS}.gate_up_proj_bias", 0),
            "decoder_block_{i}/feed_forward/up_bias": _taking_turns(f"{EXPERTS}.gate_up_proj_bias", 1),
            "decoder_block_{i}/feed_forward/down": exact(f"{EXPERTS}.down_proj"),
            "decoder_block_{i}/feed_forward/down_bias": exact(f"{EXPERTS}.down_proj_bias"),
        },
    ),
    unpack=Unpacked,
)
