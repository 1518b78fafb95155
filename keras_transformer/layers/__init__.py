"""Layers to import into your own Keras models."""

from keras_transformer.layers.activations import ClampedSwiGLU, gelu_tanh, quick_gelu, relu_squared
from keras_transformer.layers.attention import CrossAttention, MultiHeadSelfAttention
from keras_transformer.layers.bias import Bias
from keras_transformer.layers.blocks import DecoderBlock, EncoderBlock
from keras_transformer.layers.dropout import Dropout
from keras_transformer.layers.embedding import PositionalEmbedding, ReversibleEmbedding
from keras_transformer.layers.feed_forward import FeedForward
from keras_transformer.layers.logit_scale import LogitScale
from keras_transformer.layers.mixture_of_experts import MixtureOfExperts
from keras_transformer.layers.patches import PatchEmbedding, PrefixTokens
from keras_transformer.layers.placeholders import Placeholders
from keras_transformer.layers.position import AlibiBias, RelativePositionBias, RotaryEmbedding
from keras_transformer.layers.softmax import AttentionSinks, SoftCap
from keras_transformer.layers.spec_augment import SpecAugment
from keras_transformer.layers.subsampling import FrameSubsampling

__all__ = [
    "AlibiBias",
    "AttentionSinks",
    "Bias",
    "ClampedSwiGLU",
    "CrossAttention",
    "DecoderBlock",
    "Dropout",
    "EncoderBlock",
    "FeedForward",
    "FrameSubsampling",
    "LogitScale",
    "MixtureOfExperts",
    "MultiHeadSelfAttention",
    "PatchEmbedding",
    "Placeholders",
    "PositionalEmbedding",
    "PrefixTokens",
    "RelativePositionBias",
    "ReversibleEmbedding",
    "RotaryEmbedding",
    "SoftCap",
    "SpecAugment",
    "gelu_tanh",
    "quick_gelu",
    "relu_squared",
]
