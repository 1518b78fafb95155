"""Transformers for Keras 3: layers to compose, models made of them, and everything to train, run and ship these."""

import importlib

from keras_transformer import distribution, export, generation, inspection, layers, models, ops, scopes, training

__version__ = "0.1.0"

_ON_DEMAND = ("pipelines", "pretrained")  # These rooms stand on more than keras and numpy.

__all__ = [
    "distribution",
    "export",
    "generation",
    "inspection",
    "layers",
    "models",
    "ops",
    "pipelines",
    "pretrained",
    "scopes",
    "training",
]


def __getattr__(name):
    if name in _ON_DEMAND:
        return importlib.import_module(f"keras_transformer.{name}")
    raise AttributeError(f"module 'keras_transformer' has no attribute {name!r}")


def __dir__():
    return [*globals(), *_ON_DEMAND]
