"""The graphs that functional models consist of."""

import keras

# Keras layers whose result at one position depends on others, in a way that neither a cache nor a mask of ours follows.
MIXING_LAYERS = (
    keras.layers.RNN,
    keras.layers.Bidirectional,
    keras.layers.Conv1D,
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
    keras.layers.Attention,
    keras.layers.AdditiveAttention,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalMaxPooling1D,
)

# Keras layers whose result at one position depends on that position alone; normalization only of the last axis.
POSITIONWISE_LAYERS = (
    keras.layers.Dense,
    keras.layers.Dropout,
    keras.layers.LayerNormalization,
    keras.layers.Rescaling,
    keras.layers.RMSNormalization,
)
ELEMENTWISE_OPERATIONS = ("Add", "Divide", "Multiply", "Subtract", "Tanh", "TrueDivide")


def check_functional(model):
    """Refuses what has no graph of its own to look into."""
    if not isinstance(model, keras.Model) or not hasattr(model, "operations"):
        raise ValueError(f"`model` must be a functional keras.Model, built from `keras.Input`; received {model!r}.")


def functional_graph(operation):
    """The functional graph that an operation consists of, or None."""
    if isinstance(operation, keras.Sequential):
        return operation._functional
    return operation if isinstance(operation, keras.Model) and hasattr(operation, "_nodes_by_depth") else None
