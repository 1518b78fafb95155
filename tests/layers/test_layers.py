"""Every public layer goes through the shared harness, in at least six configurations."""

import collections
import inspect

import keras
import numpy as np
import pytest
from harness import check_layer, lengths, random

import keras_transformer as kt
from keras_transformer.layers import (
    AlibiBias,
    AttentionSinks,
    Bias,
    ClampedSwiGLU,
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    FrameSubsampling,
    LogitScale,
    MixtureOfExperts,
    MultiHeadSelfAttention,
    PatchEmbedding,
    Placeholders,
    PositionalEmbedding,
    PrefixTokens,
    RelativePositionBias,
    RotaryEmbedding,
    SoftCap,
    SpecAugment,
    gelu_tanh,
    quick_gelu,
    relu_squared,
)

X = random(2, 5, 8)
CONTEXT = random(2, 7, 12, seed=1)
MASK = lengths(5, 3, size=5)
PREFIX = lengths(3, 2, size=5)
CONTEXT_MASK = lengths(4, 7, size=7)
HEADS = random(2, 2, 5, 8, seed=2)
PAIRWISE = np.random.default_rng(3).random((2, 5, 5)) < 0.7
BIAS = random(2, 1, 5, 5, seed=4)
SCORES = random(2, 2, 5, 5, seed=6)
SCORES_MASK = np.random.default_rng(7).random((2, 2, 5, 5)) < 0.7

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 3}
BUCKETS = {"num_buckets": 8, "max_distance": 16}

SELF = {"x": X}
HOLDING = {"x": X, "token_ids": np.array([[9, 9, 3, 0, 1], [3, 9, 4, 9, 3]], "int32")}
CONTEXT_ALONE = {"x": CONTEXT}
CROSS = {"x": X, "context": CONTEXT}
BIAS_OF = {heads: (1, heads, 5, 5) for heads in range(1, 13)}

CASES = [
    (MultiHeadSelfAttention, {"num_heads": 2}, SELF),
    (
        MultiHeadSelfAttention,
        {"num_heads": 4, "num_key_value_heads": 2, "causal": True, "position": RotaryEmbedding()},
        {"x": X, "mask": MASK},
    ),
    (
        MultiHeadSelfAttention,
        {"num_heads": 4, "num_key_value_heads": 1, "sliding_window": 2, "position": RelativePositionBias(4, **BUCKETS)},
        {"x": X, "mask": MASK},
    ),
    (
        MultiHeadSelfAttention,
        {"num_heads": 2, "head_dim": 5, "use_bias": ["value", "query"], "scale": 0.5, "dropout": 0.4},
        {"x": X, "attention_mask": PAIRWISE},
    ),
    (
        MultiHeadSelfAttention,
        {"num_heads": 2, "causal": True, "query_key_norm": keras.layers.LayerNormalization(), "position": AlibiBias(2)},
        {"x": X, "mask": MASK, "attention_mask": PAIRWISE, "attention_bias": BIAS},
    ),
    (
        MultiHeadSelfAttention,
        {
            "num_heads": 2,
            "causal": True,
            "sliding_window": 3,
            "position": RotaryEmbedding(dim=2, interleaved=True),
            "query_key_norm": keras.layers.RMSNormalization(),
            "use_bias": False,
        },
        SELF,
    ),
    (
        MultiHeadSelfAttention,
        {"num_heads": 2, "causal": True, "position": RotaryEmbedding(scaling=DYNAMIC)},
        {"x": X, "mask": MASK},
    ),
    (
        MultiHeadSelfAttention,
        {"num_heads": 2, "causal": True, "position": RelativePositionBias(2, **BUCKETS), "softmax": SoftCap(1.5)},
        {"x": X, "mask": MASK[:, ::-1]},
    ),
    (
        MultiHeadSelfAttention,
        {"num_heads": 4, "num_key_value_heads": 2, "sliding_window": 2, "dropout": 0.3, "softmax": AttentionSinks(4)},
        {"x": X, "mask": MASK},
    ),
    (
        MultiHeadSelfAttention,
        {"num_heads": 2, "causal": True, "sliding_window": 2, "position": RotaryEmbedding()},
        {"x": X, "mask": MASK, "prefix_mask": PREFIX},
    ),
    (CrossAttention, {"num_heads": 2}, CROSS),
    (CrossAttention, {"num_heads": 4, "num_key_value_heads": 2, "use_bias": False}, CROSS),
    (CrossAttention, {"num_heads": 4, "num_key_value_heads": 1}, {**CROSS, "context_mask": CONTEXT_MASK}),
    (CrossAttention, {"num_heads": 3, "head_dim": 4, "scale": 0.2, "use_bias": ["output"]}, CROSS),
    (
        CrossAttention,
        {"num_heads": 2, "query_key_norm": keras.layers.RMSNormalization()},
        {**CROSS, "context_mask": CONTEXT_MASK, "attention_bias": random(1, 2, 5, 7)},
    ),
    (
        CrossAttention,
        {"num_heads": 2, "dropout": 0.5},
        {**CROSS, "attention_mask": np.random.default_rng(5).random((2, 5, 7)) < 0.8},
    ),
    (FeedForward, {"hidden_dim": 16}, SELF),
    (FeedForward, {"hidden_dim": 16, "activation": "relu", "use_bias": False}, SELF),
    (FeedForward, {"hidden_dim": 12, "activation": "silu", "gated": True}, SELF),
    (FeedForward, {"hidden_dim": 12, "activation": "gelu", "gated": True, "use_bias": False, "dropout": 0.3}, SELF),
    (FeedForward, {"hidden_dim": 4, "activation": keras.activations.tanh, "dropout": 0.5}, SELF),
    (FeedForward, {"hidden_dim": 12, "activation": gelu_tanh, "gated": True, "use_bias": False}, SELF),
    (FeedForward, {"hidden_dim": 12, "activation": quick_gelu}, SELF),
    (FeedForward, {"hidden_dim": 12, "activation": relu_squared, "use_bias": False}, SELF),
    (FeedForward, {"hidden_dim": 12, "activation": ClampedSwiGLU(1.5, 0.8), "gated": True}, SELF),
    (MixtureOfExperts, {"num_experts": 4, "hidden_dim": 6}, SELF),
    (MixtureOfExperts, {"num_experts": 24, "hidden_dim": 6, "use_bias": True}, SELF),
    (MixtureOfExperts, {"num_experts": 3, "hidden_dim": 5, "top_k": 3, "router_bias": True}, {"x": X, "mask": MASK}),
    (
        MixtureOfExperts,
        {"num_experts": 3, "hidden_dim": 6, "top_k": 3, "activation": "relu", "gated": False, "load_balancing": 0.1},
        {"x": X, "mask": MASK},
    ),
    (
        MixtureOfExperts,
        {
            "num_experts": 4,
            "hidden_dim": 6,
            "top_k": 4,
            "activation": ClampedSwiGLU(),
            "use_bias": True,
            "router_bias": True,
        },
        {"x": random(7, 8)},
    ),
    (MixtureOfExperts, {"num_experts": 5, "hidden_dim": 4, "top_k": 5}, {"x": random(2, 3, 4, 6)}),
    (FeedForward, {"hidden_dim": 4, "activation": None}, {"x": random(2, 3, 5, 6)}),
    (EncoderBlock, {"self_attention": 2, "feed_forward": 16}, SELF),
    (EncoderBlock, {"self_attention": 2, "feed_forward": 16, "norm_position": "post"}, {"x": X, "mask": MASK}),
    (EncoderBlock, {"self_attention": 2, "feed_forward": 16, "norm_position": "sandwich", "dropout": 0.3}, SELF),
    (
        EncoderBlock,
        {
            "self_attention": MultiHeadSelfAttention(4, num_key_value_heads=2, position=RotaryEmbedding()),
            "feed_forward": FeedForward(16, "silu", gated=True, use_bias=False),
            "norm": keras.layers.RMSNormalization(epsilon=1e-5),
            "layer_scale": 0.5,
        },
        {"x": X, "attention_mask": PAIRWISE, "attention_bias": BIAS},
    ),
    (EncoderBlock, {"self_attention": 4, "feed_forward": 8, "drop_path": 0.5}, {"x": X, "mask": MASK}),
    (
        EncoderBlock,
        {
            "self_attention": MultiHeadSelfAttention(2, position=RelativePositionBias(2, **BUCKETS), dropout=0.2),
            "feed_forward": keras.layers.Dense(8),
            "norm_position": "sandwich",
            "layer_scale": 0.1,
        },
        SELF,
    ),
    (
        EncoderBlock,
        {"self_attention": 2, "feed_forward": MixtureOfExperts(3, 12, top_k=3, load_balancing=0.01)},
        {"x": X, "mask": MASK},
    ),
    (DecoderBlock, {"self_attention": 2, "feed_forward": 16}, SELF),
    (DecoderBlock, {"self_attention": 2, "feed_forward": 16}, {"x": X, "mask": MASK, "prefix_mask": PREFIX}),
    (DecoderBlock, {"self_attention": 2, "feed_forward": 16, "cross_attention": 2}, CROSS),
    (
        DecoderBlock,
        {"self_attention": 2, "feed_forward": 16, "cross_attention": 4, "norm_position": "post", "dropout": 0.3},
        {**CROSS, "mask": MASK, "context_mask": CONTEXT_MASK},
    ),
    (
        DecoderBlock,
        {
            "self_attention": MultiHeadSelfAttention(
                2, num_key_value_heads=1, causal=True, position=RotaryEmbedding(5e5)
            ),
            "feed_forward": FeedForward(16, "silu", gated=True, use_bias=False),
            "norm": keras.layers.RMSNormalization(),
        },
        {"x": X, "mask": MASK},
    ),
    (
        DecoderBlock,
        {
            "self_attention": MultiHeadSelfAttention(2, causal=True, position=AlibiBias(2)),
            "feed_forward": 8,
            "cross_attention": CrossAttention(2, query_key_norm=keras.layers.LayerNormalization()),
            "norm_position": "sandwich",
            "layer_scale": 0.3,
        },
        {**CROSS, "attention_mask": PAIRWISE, "attention_bias": BIAS},
    ),
    (
        DecoderBlock,
        {
            "self_attention": MultiHeadSelfAttention(
                4, causal=True, sliding_window=2, position=RotaryEmbedding(scaling=YARN)
            ),
            "feed_forward": 8,
            "cross_attention": CrossAttention(4, num_key_value_heads=2, use_bias=["query", "value", "output"]),
            "drop_path": 0.5,
        },
        {**CROSS, "context_mask": CONTEXT_MASK},
    ),
    (PositionalEmbedding, {}, SELF),
    (PositionalEmbedding, {"scale": 8**0.5}, {"x": X, "mask": MASK[:, ::-1]}),
    (PositionalEmbedding, {"max_length": 5}, {"x": random(2, 5, 7)}),
    (PositionalEmbedding, {"kind": "learned", "max_length": 9}, SELF),
    (PositionalEmbedding, {"kind": "learned", "max_length": 5, "scale": 2.0}, SELF),
    (PositionalEmbedding, {"kind": "learned", "max_length": 6}, {"x": X, "mask": MASK[:, ::-1]}),
    (PositionalEmbedding, {"interleaved": False, "offset": 3}, {"x": random(2, 5, 7)}),
    (PositionalEmbedding, {"kind": "learned", "max_length": 5, "offset": 2}, {"x": X, "mask": MASK}),
    (Bias, {}, SELF),
    (Bias, {"initializer": "ones"}, {"x": random(3, 4)}),
    (Bias, {"initializer": keras.initializers.RandomNormal(stddev=0.5, seed=1)}, {"x": random(2, 3, 5, 6)}),
    (Bias, {"initializer": "glorot_uniform"}, {"x": random(4, 7)}),
    (Bias, {"initializer": keras.initializers.Constant(-2.0)}, SELF),
    (Bias, {"trainable": False}, SELF),
    (LogitScale, {}, {"x": random(3, 4)}),
    *((LogitScale, {"initial_value": value}, {"x": random(4, 2)}) for value in (-1.0, 0.0, 1, 4.5)),
    (LogitScale, {"initial_value": 0.5}, SELF),
    (PatchEmbedding, {"patch_size": 2, "dim": 5}, {"x": random(2, 4, 6, 3)}, (2, 6, 5)),
    (PatchEmbedding, {"patch_size": [3, 2], "dim": 8}, {"x": random(2, 6, 4, 1)}, (2, 4, 8)),
    (PatchEmbedding, {"patch_size": 4, "dim": 3, "use_bias": False}, {"x": random(2, 8, 8, 3)}, (2, 4, 3)),
    (PatchEmbedding, {"patch_size": 1, "dim": 4}, {"x": random(1, 3, 2, 2)}, (1, 6, 4)),
    (PatchEmbedding, {"patch_size": (5, 3), "dim": 6}, {"x": random(3, 5, 3, 4)}, (3, 1, 6)),
    (PatchEmbedding, {"patch_size": 2, "dim": 16, "use_bias": False}, {"x": random(1, 2, 8, 3)}, (1, 4, 16)),
    *(
        (
            Placeholders,
            {"token_id": token_id},
            {**HOLDING, "vectors": random(2, count, 8, seed=8)},
            X.shape,
        )
        for token_id, count in ((9, 2), (9, 1), (9, 4), (3, 2), (0, 3), (7, 1))
    ),
    (PrefixTokens, {}, SELF, (2, 6, 8)),
    (PrefixTokens, {"count": 2}, SELF, (2, 7, 8)),
    (PrefixTokens, {"count": 4}, {"x": random(3, 1, 6)}, (3, 5, 6)),
    (PrefixTokens, {"count": 5}, {"x": random(1, 3, 4)}, (1, 8, 4)),
    (PrefixTokens, {"count": 1}, {"x": random(4, 2, 3)}, (4, 3, 3)),
    (PrefixTokens, {"count": 3}, CONTEXT_ALONE, (2, 10, 12)),
    (RotaryEmbedding, {}, {"x": HEADS}),
    (RotaryEmbedding, {"base": 500.0, "dim": 4}, {"x": HEADS}),
    (RotaryEmbedding, {"interleaved": True}, {"x": HEADS, "positions": np.array([3, 4, 7, 8, 11], "int32")}),
    (RotaryEmbedding, {"scaling": {"rope_type": "linear", "factor": 2.5}}, {"x": HEADS}),
    (RotaryEmbedding, {"scaling": DYNAMIC}, {"x": HEADS}),
    (RotaryEmbedding, {"scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}}, {"x": HEADS}),
    (RotaryEmbedding, {"scaling": LLAMA3, "dim": 6, "interleaved": True}, {"x": HEADS}),
    (RelativePositionBias, {"num_heads": 1}, SELF, BIAS_OF[1]),
    (RelativePositionBias, {"num_heads": 2, "bidirectional": False}, SELF, BIAS_OF[2]),
    (RelativePositionBias, {"num_heads": 4, **BUCKETS}, SELF, BIAS_OF[4]),
    (RelativePositionBias, {"num_heads": 3, "num_buckets": 4, "max_distance": 3}, SELF, BIAS_OF[3]),
    (RelativePositionBias, {"num_heads": 4, "num_buckets": 5, "bidirectional": False}, SELF, BIAS_OF[4]),
    (RelativePositionBias, {"num_heads": 8, "max_distance": 512}, {"x": random(3, 5, 6)}, BIAS_OF[8]),
    (FrameSubsampling, {"dim": 6}, SELF, (2, 2, 6)),
    (FrameSubsampling, {"dim": 6}, {"x": X, "mask": MASK}, (2, 2, 6)),
    (FrameSubsampling, {"dim": 4, "convolutions": 1}, {"x": X, "mask": MASK}, (2, 3, 4)),
    (FrameSubsampling, {"dim": 4, "convolutions": 3, "activation": "tanh"}, SELF, (2, 1, 4)),
    (FrameSubsampling, {"dim": 3, "activation": "silu"}, CONTEXT_ALONE, (2, 2, 3)),
    (FrameSubsampling, {"dim": 5, "convolutions": 1, "activation": "relu"}, {"x": random(3, 8, 2)}, (3, 4, 5)),
    (SpecAugment, {}, SELF),
    (SpecAugment, {"time_masks": 0, "feature_share": 0.9}, {"x": X, "mask": MASK}),
    (SpecAugment, {"feature_masks": 0, "time_share": 0.5, "seed": 3}, {"x": X, "mask": MASK}),
    (SpecAugment, {"time_masks": 4, "time_share": 0.9}, CONTEXT_ALONE),
    (SpecAugment, {"time_masks": 0, "feature_masks": 0}, SELF),
    (SpecAugment, {"time_masks": 1, "feature_masks": 1, "seed": 0}, {"x": random(3, 8, 2)}),
    *((SoftCap, {"cap": cap}, {"scores": SCORES}) for cap in (0.5, 1, 30.0)),
    *((SoftCap, {"cap": cap}, {"scores": SCORES, "mask": SCORES_MASK}) for cap in (0.5, 1, 30.0)),
    *(
        (AttentionSinks, {"num_heads": heads}, {"scores": random(2, heads, 5, 5, seed=heads)})
        for heads in (1, 2, 3, 4, 8)
    ),
    (AttentionSinks, {"num_heads": 2}, {"scores": SCORES, "mask": SCORES_MASK}),
    *((AlibiBias, {"num_heads": heads}, SELF, BIAS_OF[heads]) for heads in (1, 2, 3, 4, 8, 12)),
]


@pytest.mark.parametrize("case", CASES, ids=[layer.__name__ for layer, *_ in CASES])
def test_layer(case):
    layer_class, config, inputs, *shape = case
    check_layer(layer_class, config, inputs, *shape)


def test_every_public_layer_has_six_configurations():
    counts = collections.Counter(layer for layer, *_ in CASES)
    exported = [getattr(kt.layers, name) for name in kt.layers.__all__]
    layers = [entry for entry in exported if inspect.isclass(entry) and issubclass(entry, keras.layers.Layer)]
    assert len(layers) >= 9
    for layer in layers:
        # A layer of Keras, with what it lacks; `Dropout`, whose call is our own, has a file of tests.
        if layer.call.__module__.startswith("keras.src.") or layer is kt.layers.Dropout:
            continue
        assert counts[layer] >= 6, layer.__name__
