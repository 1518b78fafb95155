"""Mistral: LLaMA without biases, and with a sliding window."""

from keras_transformer.pretrained.families import llama

DEFAULTS = {**llama.DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def language_model(fields):
    fields.fill(DEFAULTS)
    window = fields.nullable("sliding_window", 4096)

    def block(i):
        attention = llama.attention(fields, sliding_window=window)
        return llama.block(fields, i, attention, llama.feed_forward(fields))

    return llama.decoder(fields, block)


FAMILY = llama.causal_family("Mistral", language_model)
