"""What training a Transformer needs beside Keras' own parts: a schedule, a loss, metrics and callbacks."""

from keras_transformer.training.adapters import add_adapters, load_adapters, merge_adapters, save_adapters
from keras_transformer.training.allocation import keep_memory
from keras_transformer.training.attention_images import AttentionImages
from keras_transformer.training.calibration import gptq_config
from keras_transformer.training.callbacks import AverageWeights, BleuScore
from keras_transformer.training.compilation import compile_step
from keras_transformer.training.ctc import CTCLoss
from keras_transformer.training.losses import SmoothedCrossEntropy
from keras_transformer.training.metrics import Perplexity, TokenAccuracy
from keras_transformer.training.resume import Resume
from keras_transformer.training.schedules import InverseSquareRoot

__all__ = [
    "AttentionImages",
    "AverageWeights",
    "BleuScore",
    "CTCLoss",
    "InverseSquareRoot",
    "Perplexity",
    "Resume",
    "SmoothedCrossEntropy",
    "TokenAccuracy",
    "add_adapters",
    "compile_step",
    "gptq_config",
    "keep_memory",
    "load_adapters",
    "merge_adapters",
    "save_adapters",
]
