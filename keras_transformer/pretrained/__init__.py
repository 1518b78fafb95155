"""Checkpoints in the Hugging Face layout, as functional models of this library's blocks."""

from keras_transformer.pretrained.loading import load, save

__all__ = ["load", "save"]
