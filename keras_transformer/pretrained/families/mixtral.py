"""Mixtral: Mistral with experts for a feed-forward; files keep each projection of each expert by itself."""

from keras_transformer.layers import MixtureOfExperts
from keras_transformer.pretrained.families import llama, parts

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def language_model(fields):
    fields.fill(DEFAULTS)
    window = fields.take("sliding_window")
    activation = parts.activation(fields, "hidden_act", "silu")
    # Files' jitter also reaches the experts; here the router alone, as in Switch Transformers.
    jitter = fields.take("router_jitter_noise", default=0.0)

    def block(i):
        feed_forward = experts(fields, 8, 2, activation=activation, router_jitter=jitter)
        return llama.block(fields, i, llama.attention(fields, sliding_window=window), feed_forward)

    return llama.decoder(fields, block)


def experts(fields, number, top_k, **options):
    """The experts of a block, by default `number` of them, of which a token takes `top_k`."""
    factor = fields.take("router_aux_loss_coef", default=0.001)
    balanced = fields.take("output_router_logits", default=False)
    return MixtureOfExperts(
        fields.take("num_local_experts", "num_experts", default=number),
        fields.need("intermediate_size"),
        top_k=fields.take("num_experts_per_tok", default=top_k),
        # The factor is for the balance of all blocks together; here each has a loss of its own, as in the paper.
        load_balancing=factor / fields.need("num_hidden_layers") if balanced else 0.0,
        **options,
    )


FAMILY = llama.causal_family(
    "Mixtral",
    language_model,
    {
        **llama.WEIGHTS,
        "decoder_block_{i}/feed_forward/router": "layers.{i}.block_sparse_moe.gate",
        "decoder_block_{i}/feed_forward/gate": "layers.{i}.block_sparse_moe.experts.{expert}.w1",
        "decoder_block_{i}/feed_forward/down": "layers.{i}.block_sparse_moe.experts.{expert}.w2",
        "decoder_block_{i}/feed_forward/up": "layers.{i}.block_sparse_moe.experts.{expert}.w3",
    },
)
