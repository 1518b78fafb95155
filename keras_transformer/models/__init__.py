"""Functional-API models made of the library's layers."""

from keras_transformer.models.causal_lm import causal_lm
from keras_transformer.models.text_classifier import text_classifier
from keras_transformer.models.transformer import transformer

__all__ = ["causal_lm", "text_classifier", "transformer"]
