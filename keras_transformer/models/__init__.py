"""Functional-API models made of the library's layers."""

from keras_transformer.models.text_classifier import text_classifier
from keras_transformer.models.transformer import transformer

__all__ = ["text_classifier", "transformer"]
