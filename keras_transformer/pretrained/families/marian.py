"""Marian: post-norm encoder and decoder with sinusoidal positions; vocabularies and embeddings may be two."""

from keras_transformer.pretrained.families.sequence_to_sequence import WEIGHTS, embedding, post_norm_transformer
from keras_transformer.pretrained.family import Family
from keras_transformer.pretrained.weights import exact


def build(fields, task, stored):
    dim, size = fields.take("d_model", "hidden_size", default=1024), fields.take("vocab_size", default=58101)
    target_size = fields.take("decoder_vocab_size", default=size)
    if fields.take("share_encoder_decoder_embeddings", default=True):
        fields.only("tie_word_embeddings", True)
        embeddings, tied = [embedding(size, dim)] * 2, True
    else:
        embeddings = embedding(size, dim, "source_embedding"), embedding(target_size, dim, "target_embedding")
        tied = fields.take("tie_word_embeddings", default=True)
    position = {"kind": "sinusoidal", "interleaved": False}
    return post_norm_transformer(fields, task, stored, embeddings, position, tied=tied)


def family(configuration):
    shared = configuration.get("share_encoder_decoder_embeddings", True)
    own = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    return Family(
        build=build,
        tasks={"MarianModel": "bare", "MarianMTModel": "seq2seq"},
        weights={
            **WEIGHTS,
            "embedding": "shared",
            "source_embedding": "encoder.embed_tokens",
            "target_embedding": "decoder.embed_tokens",
        },
        heads={"logits": "lm_head", "logits_bias": exact("final_logits_bias", (1, -1))},
        prefix="model.",
        tied=dict.fromkeys((*own, "lm_head.weight"), "model.shared.weight") if shared else {"lm_head.weight": own[1]},
        buffers=(r"(encoder|decoder)\.embed_positions\.weight",),
    )
