"""Qwen2: LLaMA with biases for query, key and value alone, and a sliding window from some layer on."""

from keras_transformer.pretrained.families import llama

DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}


def language_model(fields):
    fields.fill(DEFAULTS)
    window = fields.nullable("sliding_window", 4096)
    window = window if fields.take("use_sliding_window", default=False) else None
    first = fields.take("max_window_layers", default=28)
    slides = fields.take("layer_types")

    def block(i):
        windowed = i >= first if slides is None else slides[i] == "sliding_attention"
        biased = ["query", "key", "value"]
        attention = llama.attention(fields, use_bias=biased, sliding_window=window if windowed else None)
        return llama.block(fields, i, attention, llama.feed_forward(fields))

    return llama.decoder(fields, block)


FAMILY = llama.causal_family("Qwen2", language_model)
