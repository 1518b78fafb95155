"""Checkpoints in the Hugging Face layout, and torch.nn's layers, as models and blocks of this library."""

from keras_transformer.pretrained.loading import load, save
from keras_transformer.pretrained.torch_layers import from_torch, to_torch

__all__ = ["from_torch", "load", "save", "to_torch"]
