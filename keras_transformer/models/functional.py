"""The graphs that functional models consist of."""

import keras


def functional_graph(operation):
    """The functional graph that an operation consists of, or None."""
    if isinstance(operation, keras.Sequential):
        return operation._functional
    return operation if isinstance(operation, keras.Model) and hasattr(operation, "_nodes_by_depth") else None
