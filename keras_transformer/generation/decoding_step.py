"""One step of decoding, and the encoder before it, as models by themselves: for files that no loop can be part of."""

import keras
from keras import ops

from keras_transformer.generation.graph import DecodingGraph, mask_name, probe
from keras_transformer.ops.masks import get_mask, set_mask
from keras_transformer.scopes import DecodingScope


def decoding_step(model):
    """The decoder as a model of its own, from new tokens and a key-value cache to logits and the cache with them in it.

    Whoever runs it keeps the loop: the prompt goes in first, as many tokens at once as it has, and then token by token.
    What is called `past_...` goes in as zeros at first, and then as what came out as `present_...`. How many tokens
    there is room for is the length of the `past_key_...`, which no call may go beyond.

    Args:
        model: functional `keras.Model` that a `Generator` takes. The step shares its variables.

    Returns:
        Functional `keras.Model`. Its inputs, by name:

        - the token input (`token_ids`, `target_ids`): int32 `[B, T]`, the new tokens.
        - `padding_mask`, or `target_padding_mask` for `target_ids`: boolean `[B, T]`, True for real tokens. Prompts of
          different lengths are padded on the left.
        - `past_length`: int32 `[B]`, how many tokens came before, padding included, the same number for each row.
        - `past_key_0`, `past_value_0` float `[B, K, max_length, D]` and `past_mask_0` boolean `[B, max_length]`, and so
          on for each self-attention; `past_padding_0` int32 `[B, 1]`, where positions are added.
        - `context_key_0`, `context_value_0` and so on: what `encoding_step` returns, where there is an encoder.
        - `segment_ids`: int32 `[B, T]`, where the model has it.

        Its outputs are a dict of `logits` `[B, T, vocabulary]`, and a `present_...` for each `past_...`.

    Raises:
        ValueError: if the model cannot be decoded token by token.

    Example:

    >>> model = kt.models.causal_lm(20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> step = kt.generation.decoding_step(model)
    >>> feed = {x.name: np.zeros([2, *(size or 5 for size in x.shape[1:])], x.dtype) for x in step.inputs}
    >>> found = step({**feed, "token_ids": np.array([[3, 4], [5, 6]]), "padding_mask": np.ones((2, 2), bool)})
    >>> tuple(found["logits"].shape), tuple(found["present_key_0"].shape)
    ((2, 2, 20), (2, 2, 5, 4))
    """
    layer = DecodingStep(model, name="step")
    return _functional(layer, f"{model.name}_step")


def encoding_step(model):
    """The encoder as a model of its own, from the sources to what `decoding_step` reads of them.

    Args:
        model: functional `keras.Model` that a `Generator` takes, with other inputs than the decoder's tokens. The step
            shares its variables.

    Returns:
        Functional `keras.Model` from the sources, by their names in the model, to a dict of the keys and values of the
        cross-attentions, `context_key_0` and so on, and what else the decoder reads of the sources, as `source_0` and
        so on.

    Raises:
        ValueError: if the model has no source, or cannot be decoded token by token.

    Example:

    >>> model = kt.models.transformer(20, 20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> encoder, step = kt.generation.encoding_step(model), kt.generation.decoding_step(model)
    >>> context = encoder({"source_ids": np.array([[3, 4, 5]])})
    >>> {name: tuple(context[name].shape) for name in sorted(context)}
    {'context_key_0': (1, 2, 3, 4), 'context_mask_0': (1, 3), 'context_value_0': (1, 2, 3, 4)}
    """
    layer = EncodingStep(model, name="step")
    if not layer.graph.source_inputs:
        raise ValueError(
            f"`model` must have other inputs than the tokens to decode; received one with {layer.graph.token_input!r} "
            "alone, whose `decoding_step` needs no encoder."
        )
    return _functional(layer, f"{model.name}_encoder")


def _functional(layer, name):
    inputs = {
        name: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name) for name, x in layer.input_tensors().items()
    }
    return keras.Model(inputs, layer(inputs), name=name)


class _Step(keras.layers.Layer):
    """What both steps know: the two halves of the model, and what its cache looks like."""

    def __init__(self, model, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.model = model
        self.graph = DecodingGraph(model)
        self.boundary = self.graph.boundary_tensors()
        self._look_into_the_cache()
        self.built = True

    def _look_into_the_cache(self):
        """Runs two tokens to see what there is in a cache: by public name, its entry, key and symbolic tensor."""
        sources = {name: probe(x, rows=2) for name, x in self.graph.source_inputs.items()}
        boundary = self.graph.encode(sources)
        real = ops.ones((2, 2), "bool")
        with DecodingScope(max_length=2, padding_mask=real) as scope:
            self.logits = _symbolic(self.graph.decode(ops.ones((2, 2), "int32"), boundary), {1})
        self.past, self.context, counts = {}, {}, {}
        for entry, tensors in scope.cache.items():
            kind = next((kind for kind in ("key", "padding") if kind in tensors), "context")
            number = counts[kind] = counts.get(kind, -1) + 1
            for key, x in tensors.items():
                length = {1} if "mask" in key else {2} if "key" in key or "value" in key else set()
                (self.context if kind == "context" else self.past)[f"{key}_{number}"] = (
                    entry,
                    key,
                    _symbolic(x, length),
                )
        # Cross-attention reads its context in the cache; what else is read of the sources comes along.
        self.also = {}
        for i, (x, in_cache) in enumerate(zip(boundary, self.graph.context_alone(), strict=True)):
            if not in_cache:
                self.also[i] = get_mask(x) is not None

    def source_tensors(self):
        """What an encoder hands on, by name, as symbolic tensors."""
        tensors = {name: x for name, (_, _, x) in self.context.items()}
        for i, has_mask in self.also.items():
            x = self.boundary[i]
            tensors[f"source_{i}"] = keras.KerasTensor(x.shape, x.dtype)
            if has_mask:
                tensors[f"source_mask_{i}"] = keras.KerasTensor(x.shape[:2], "bool")
        return tensors

    def get_config(self):
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "model": keras.saving.deserialize_keras_object(config["model"])})


@keras.saving.register_keras_serializable(package="keras_transformer")
class EncodingStep(_Step):
    """The layer of `encoding_step`."""

    def input_tensors(self):
        return self.graph.source_inputs

    def call(self, inputs):
        boundary = self.graph.encode(inputs)
        # A first token fills the cache of the cross-attentions; what it makes besides is not read.
        first = ops.ones((ops.shape(next(iter(inputs.values())))[0], 1), "int32")
        with DecodingScope(max_length=1) as scope:
            self.graph.decode(first, boundary)
        found = {name: scope.cache[entry][key] for name, (entry, key, _) in self.context.items()}
        for i, has_mask in self.also.items():
            found[f"source_{i}"] = boundary[i]
            if has_mask:
                found[f"source_mask_{i}"] = get_mask(boundary[i])
        return found

    def compute_output_spec(self, inputs):
        return self.source_tensors()


@keras.saving.register_keras_serializable(package="keras_transformer")
class DecodingStep(_Step):
    """The layer of `decoding_step`."""

    def input_tensors(self):
        graph = self.graph
        tokens = {graph.token_input: "int32", mask_name(graph.token_input): "bool"}
        tokens |= {} if graph.segment_input is None else {graph.segment_input: "int32"}
        tensors = {name: keras.KerasTensor((None, None), dtype) for name, dtype in tokens.items()}
        tensors["past_length"] = keras.KerasTensor((None,), "int32")
        tensors |= {f"past_{name}": x for name, (_, _, x) in self.past.items()}
        return tensors | self.source_tensors()

    def call(self, inputs):
        graph = self.graph
        tokens = inputs[graph.token_input]
        cache = {}
        for name, (entry, key, _) in self.past.items():
            cache.setdefault(entry, {})[key] = inputs[f"past_{name}"]
        for name, (entry, key, _) in self.context.items():
            cache.setdefault(entry, {})[key] = inputs[name]
        boundary = [self._boundary_of(i, inputs) for i in range(len(self.boundary))]
        real = inputs[mask_name(graph.token_input)]
        with StepScope(cache, inputs["past_length"][0], padding_mask=real) as scope:
            logits = graph.decode(tokens, boundary, inputs.get(graph.segment_input))
        present = {f"present_{name}": scope.cache[entry][key] for name, (entry, key, _) in self.past.items()}
        length = inputs["past_length"] + ops.cast(ops.shape(tokens)[1], "int32")
        return {"logits": logits, "present_length": length, **present}

    def _boundary_of(self, i, inputs):
        if i in self.also:
            return set_mask(inputs[f"source_{i}"], inputs.get(f"source_mask_{i}"))
        # Stands for a context whose keys and values are in the cache.
        x = self.boundary[i]
        rows = ops.shape(inputs[self.graph.token_input])[0]
        return ops.zeros([rows if axis == 0 else size or 1 for axis, size in enumerate(x.shape)], x.dtype)

    def compute_output_spec(self, inputs):
        present = {f"present_{name}": x for name, (_, _, x) in self.past.items()}
        return {"logits": self.logits, "present_length": keras.KerasTensor((None,), "int32"), **present}


class StepScope(DecodingScope):
    """A `DecodingScope` that writes by choosing slots: no exporter of ONNX knows how to update a slice."""

    def written(self, kept, new, axis):
        length = ops.shape(new)[axis]
        slots = ops.arange(ops.shape(kept)[axis], dtype="int32") - self.index
        moved = ops.take(new, ops.clip(slots, 0, length - 1), axis=axis)
        is_new = ops.logical_and(slots >= 0, slots < length)
        is_new = ops.reshape(is_new, (-1, *(1,) * (-1 - axis)))
        return ops.where(is_new, moved, kept)


def _symbolic(x, varying):
    """The symbolic tensor of an example, whose rows and whose axes in `varying` have any size."""
    shape = [None if axis == 0 or axis in varying else size for axis, size in enumerate(x.shape)]
    return keras.KerasTensor(tuple(shape), keras.backend.standardize_dtype(x.dtype))
