"""BART: post-norm encoder and decoder that share one embedding, with learned positions."""

from keras_transformer.pretrained.families.sequence_to_sequence import WEIGHTS, embedding, post_norm_transformer
from keras_transformer.pretrained.family import Family
from keras_transformer.pretrained.weights import exact

# Files keep two rows in front of the first position, which no token reads.
OFFSET = 2


def build(fields, task, stored):
    fields.only("tie_word_embeddings", True)
    shared = embedding(fields.take("vocab_size", default=50265), fields.take("d_model", "hidden_size", default=1024))
    position = {"kind": "learned", "offset": OFFSET}
    return post_norm_transformer(fields, task, stored, (shared, shared), position, embedding_norm=True)


FAMILY = Family(
    build=build,
    tasks={"BartModel": "bare", "BartForConditionalGeneration": "seq2seq"},
    weights={
        **WEIGHTS,
        "embedding": "shared",
        "encoder_position": "encoder.embed_positions",
        "decoder_position": "decoder.embed_positions",
        "encoder_embedding_norm": "encoder.layernorm_embedding",
        "decoder_embedding_norm": "decoder.layernorm_embedding",
    },
    heads={"logits_bias": exact("final_logits_bias", (1, -1))},
    prefix="model.",
    tied={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    buffers=(r"(encoder|decoder)\.version",),
)
