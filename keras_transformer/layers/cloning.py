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


@keras.saving.register_keras_serializable(package="keras_transformer")
class QuantizedProjections(keras.dtype_policies.DTypePolicyMap):
    """The dtype policies of the projections that a layer has made itself, and the configurations of their quantization.

    Keras gives each of them a policy of its own, which is found by the end of its path: the rest is what the layer and
    those around it are called.
    """

    def __init__(self, default_policy=None, policy_map=None, configs=None):
        super().__init__(default_policy, policy_map)
        self.configs = {} if configs is None else configs

    def get_config(self):
        return {**super().get_config(), "configs": keras.saving.serialize_keras_object(self.configs)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        configs = keras.saving.deserialize_keras_object(config["configs"], custom_objects=custom_objects)
        return super().from_config({**config, "configs": configs}, custom_objects)


def quantized_dtype(layer):
    """What a configuration has as `dtype` where projections that the layer has made itself are quantized, or {}."""
    parts = [x for x in layer._layers if isinstance(x, keras.layers.Dense) and x.quantization_mode is not None]
    if not parts:
        return {}
    policies = {f"(.*/)?{part.name}": policy_of(part) for part in parts}
    policy = QuantizedProjections(default_policy(layer), policies, {x.name: x.quantization_config for x in parts})
    return {"dtype": keras.saving.serialize_keras_object(policy)}


def quantization_config(dtype_policy, name):
    """How the projection called `name` of a layer with this policy was quantized, or None."""
    return dtype_policy.configs.get(name) if isinstance(dtype_policy, QuantizedProjections) else None


def policy_of(layer):
    """The dtype policy of a layer by itself."""
    policy = layer.dtype_policy
    return policy[layer.path] if isinstance(policy, keras.dtype_policies.DTypePolicyMap) else policy


def default_policy(layer):
    """The dtype policy of a layer and of those of its parts that have none of their own."""
    policy = layer.dtype_policy
    return policy.default_policy if isinstance(policy, keras.dtype_policies.DTypePolicyMap) else policy
