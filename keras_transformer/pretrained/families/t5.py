"""T5: pre-norm encoder and decoder with RMS norm, and a table of relative positions that a whole stack shares."""

import functools

import keras

from keras_transformer.layers import (
    CrossAttention,
    DecoderBlock,
    Dropout,
    EncoderBlock,
    FeedForward,
    MultiHeadSelfAttention,
    RelativePositionBias,
)
from keras_transformer.pretrained.families import parts
from keras_transformer.pretrained.families.sequence_to_sequence import (
    embedding,
    output_projection,
    sequence_to_sequence,
)
from keras_transformer.pretrained.family import Family

GATED = "gated-"


def build(fields, task, stored):
    fields.only("is_decoder", False)
    # Positions are relative, so that `n_positions` bounds nothing; classifiers are other heads.
    fields.ignore("pad_token_id decoder_start_token_id n_positions output_past classifier_dropout num_labels")
    shared = embedding(fields.take("vocab_size", default=32128), fields.take("d_model", default=512))
    depth = fields.take("num_layers", default=6)
    target_depth = fields.take("num_decoder_layers", default=depth)
    heads = fields.take("num_heads", default=8)
    dropout = fields.take("dropout_rate", default=0.1)
    epsilon = fields.take("layer_norm_epsilon", default=1e-6)
    buckets = fields.take("relative_attention_num_buckets", default=32)
    max_distance = fields.take("relative_attention_max_distance", default=128)
    options = {"head_dim": fields.take("d_kv", default=64), "scale": 1.0, "use_bias": False, "dropout": dropout}
    activation, gated = _activation(fields)
    feed_forward = FeedForward(fields.take("d_ff", default=2048), activation, gated, use_bias=False, dropout=dropout)

    def norm(name=None):
        return parts.keeps_mask(keras.layers.RMSNormalization(epsilon=epsilon, name=name))

    def drop(x, name):
        return Dropout(dropout, name=name)(x)

    def stack(side, token_ids, depth, kind, *context, **masks):
        decodes = side == "decoder"
        x = drop(shared(token_ids), f"{side}_embedding_dropout")
        bias = RelativePositionBias(heads, buckets, max_distance, not decodes, name=f"{side}_position_bias")(x)
        attention = MultiHeadSelfAttention(heads, causal=decodes, **options)
        for i in range(depth):
            block = kind(attention, feed_forward, norm=norm(), dropout=dropout, name=f"{side}_block_{i}")
            x = block(x, *context, attention_bias=bias, **masks)
        return drop(norm(f"{side}_norm")(x), f"{side}_dropout")

    def encode(source_ids, mask):
        return stack("encoder", source_ids, depth, EncoderBlock, mask=mask)

    def decode(target_ids, context, mask):
        block = functools.partial(DecoderBlock, cross_attention=CrossAttention(heads, **options))
        return stack("decoder", target_ids, target_depth, block, context, context_mask=mask)

    # Version 1.0 scales the hidden states and reads them by the embedding, 1.1 reads them by a kernel of its own. Newer
    # configurations tell by a field; older ones by whether the embedding is tied, which the newer always affirm.
    scaled = fields.take("scale_decoder_outputs", default=fields.take("tie_word_embeddings", default=True))
    tied = scaled or "lm_head.weight" not in stored

    def logits(x):
        if scaled:
            x = parts.keeps_mask(keras.layers.Rescaling(shared.output_dim**-0.5, name="logits_scale"))(x)
        return output_projection(shared, tied)(x)

    return sequence_to_sequence(fields, task, encode, decode, logits)


def _activation(fields):
    """The activation of the feed-forward and whether it is gated, from `"relu"`, `"gated-silu"` and so on."""
    kind = fields.one_of("feed_forward_proj", [g + name for g in ("", GATED) for name in parts.ACTIVATIONS], "relu")
    gated, name = kind.startswith(GATED), kind.removeprefix(GATED)
    name = "gelu_new" if kind == "gated-gelu" else name
    fields.only("is_gated_act", gated)
    fields.only("dense_act_fn", name)
    return parts.ACTIVATIONS[name], gated


def _weights(gated):
    up = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
    modules = {  # The parts of a sublayer, in files as `layer.{number of the sublayer}.{module}.{part}`.
        "self_attention": ("SelfAttention", {"query": "q", "key": "k", "value": "v", "output": "o"}),
        "cross_attention": ("EncDecAttention", {"query": "q", "key": "k", "value": "v", "output": "o"}),
        "feed_forward": ("DenseReluDense", {**up, "down": "wo"}),
    }
    sublayers = {"encoder": ("self_attention", "feed_forward"), "decoder": tuple(modules)}
    names = {"embedding": "shared"}
    for side, own in sublayers.items():
        block = f"{side}.block.0.layer.0"
        names[f"{side}_position_bias"] = f"{block}.SelfAttention.relative_attention_bias"
        names[f"{side}_norm"] = f"{side}.final_layer_norm"
        for number, sublayer in enumerate(own):
            module, projections = modules[sublayer]
            ours, theirs = f"{side}_block_{{i}}/{sublayer}", f"{side}.block.{{i}}.layer.{number}"
            names[f"{ours}_norm"] = f"{theirs}.layer_norm"
            names.update({f"{ours}/{part}": f"{theirs}.{module}.{name}" for part, name in projections.items()})
    return names


def family(configuration):
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    return Family(
        build=build,
        tasks={"T5Model": "bare", "T5ForConditionalGeneration": "seq2seq"},
        weights=_weights(configuration.get("feed_forward_proj", "relu").startswith(GATED)),
        heads={"logits": "lm_head"},
        tied=dict.fromkeys(tied, "shared.weight"),
        # What old files hold, though no model ever read it.
        buffers=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )
