"""Checkpoints in the Hugging Face layout, and torch.nn's layers, as models and blocks of this library."""

from keras_transformer.pretrained.family import Family, register
from keras_transformer.pretrained.fields import Fields
from keras_transformer.pretrained.loading import load, save
from keras_transformer.pretrained.torch_layers import from_torch, to_torch
from keras_transformer.pretrained.weights import Stored, exact, inside, packed

__all__ = [
    "Family",
    "Fields",
    "Stored",
    "exact",
    "from_torch",
    "inside",
    "load",
    "packed",
    "register",
    "save",
    "to_torch",
]
