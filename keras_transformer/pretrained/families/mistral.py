"""Mistral: LLaMA without biases, and with a sliding window."""

from keras_transformer.pretrained.families import llama


def build(fields, task, stored):
    window = fields.nullable("sliding_window", 4096)

    def block(i):
        attention = llama.attention(fields, key_value_heads=8, sliding_window=window)
        return llama.block(fields, i, attention, llama.feed_forward(fields))

    return llama.decoder(fields, task, block)


FAMILY = llama.causal_family("Mistral", build)
