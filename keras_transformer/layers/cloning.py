"""How a layer takes other layers as its parts: each is cloned, named by its role, and takes the whole's dtype."""

import keras


def clone_layer(layer, name, dtype_policy, argument):
    """Returns a fresh, unbuilt copy of `layer` (or of the layer that a configuration describes) called `name`.

    A part that has the global dtype policy takes that of the whole, and so do its own parts that shared it; one that
    was given a policy of its own keeps it. A configuration is taken as it is: what was decided when its layer was
    first cloned must not depend on the global policy of the process that loads it.
    """
    described = isinstance(layer, dict)
    if described:
        layer = keras.saving.deserialize_keras_object(layer)
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(f"`{argument}` must be a Keras layer; received {layer!r}.")
    config = layer.get_config()
    if not described and layer.dtype_policy == keras.config.dtype_policy():
        config = _with_policy(config, config["dtype"], keras.saving.serialize_keras_object(dtype_policy))
    return type(layer).from_config({**config, "name": name})


def _with_policy(config, old, new):
    """The configuration with another dtype policy wherever it, or a part at any depth, had the old one."""
    if isinstance(config, dict):
        return {
            key: new if key == "dtype" and value == old else _with_policy(value, old, new)
            for key, value in config.items()
        }
    return [_with_policy(value, old, new) for value in config] if isinstance(config, list) else config
