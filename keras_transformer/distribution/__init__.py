"""Training on several devices, processes or machines, by the engines of Keras and its backends."""

from keras_transformer.distribution.engines import Engine, start
from keras_transformer.distribution.layouts import layout_map

__all__ = ["Engine", "layout_map", "start"]
