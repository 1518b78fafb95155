"""Generating tokens from any functional model made of the library's layers."""

from keras_transformer.generation.beam_search import BeamSearch
from keras_transformer.generation.constraints import Constraints
from keras_transformer.generation.decoding_step import decoding_step, encoding_step
from keras_transformer.generation.generator import Generator
from keras_transformer.generation.rescoring import AttentionRescoring
from keras_transformer.generation.samplers import Greedy, Sampling

__all__ = [
    "AttentionRescoring",
    "BeamSearch",
    "Constraints",
    "Generator",
    "Greedy",
    "Sampling",
    "decoding_step",
    "encoding_step",
]
