"""Pure functions on tensors: no layers, no state."""

from keras_transformer.ops.attention import dot_product_attention
from keras_transformer.ops.masks import check_mask, first_real, make_attention_mask

__all__ = ["check_mask", "dot_product_attention", "first_real", "make_attention_mask"]
