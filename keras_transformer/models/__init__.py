"""Functional-API models made of the library's layers."""

from keras_transformer.models.transformer import transformer

__all__ = ["transformer"]
