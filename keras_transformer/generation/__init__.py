"""Generating tokens from any functional model made of the library's layers."""

from keras_transformer.generation.beam_search import BeamSearch
from keras_transformer.generation.generator import Generator
from keras_transformer.generation.samplers import Greedy, Sampling

__all__ = ["BeamSearch", "Generator", "Greedy", "Sampling"]
