import inspect
import weakref

import keras
import numpy as np
from keras import ops

from keras_transformer.generation.batches import (
    PROMPT_BUCKET,
    SOURCE_BUCKET,
    align_right,
    bucket,
    bucket_tensor,
    is_ragged,
    left_padded,
    pad_rows,
    real_span,
)
from keras_transformer.generation.beam_search import BeamSearch
from keras_transformer.generation.compilation import can_jit, compile_function, run_once
from keras_transformer.generation.graph import DecodingGraph, mask_name, probe
from keras_transformer.generation.history import History
from keras_transformer.generation.products import StepProducts
from keras_transformer.generation.samplers import Greedy, Sampling
from keras_transformer.generation.stages import Stages
from keras_transformer.layers import Placeholders, PositionalEmbedding
from keras_transformer.scopes import Branches, DecodingScope

_checked = weakref.WeakSet()  # The models whose cached steps were held to the same without a cache.

SAMPLERS = {"greedy": Greedy, "sampling": Sampling, "beam_search": lambda: BeamSearch(4)}


class Generator:
    """Generates tokens from a functional model: decoder-only or encoder-decoder, built by hand or by `kt.models`.

    The model's graph is cut at the input that holds the decoder's tokens. What does not depend on it, an encoder say,
    runs once; the rest runs token by token with a key-value cache. The whole loop is one compiled function. Prompts of
    different lengths share a batch: they are aligned at their ends, and padded to a few lengths so that little is
    compiled.

    Args:
        model: functional `keras.Model` with the library's layers, from an integer input of tokens `[B, T]` (and
            others) to logits `[B, T, vocabulary]`, alone or as `"logits"` in a dict.
        start_id: int. The token that sequences start with where no prompt is given.
        end_id: int, or list of ints. What ends a sequence, itself included; None to always generate all tokens.
        pad_id: int. What fills prompts and results to equal lengths.
        sampler: `"greedy"`, `"sampling"`, `"beam_search"` (4 beams), or a `Greedy`, `Sampling` or `BeamSearch`.
        jit_compile: boolean, or `"auto"`: XLA on TensorFlow and JAX; torch runs as it is.
        constraints: `Constraints`, what is forbidden, forced or made less likely, or None.

    An input that says which tokens are real is known by its name: `padding_mask` for `token_ids`, `source_padding_mask`
    for `source_ids`. Where it is not given, `pad_id` is padding: at the ends of a prompt, anywhere in a source. A model
    whose prompt sees itself in both directions has an input `segment_ids` beside `token_ids`: 0 for what does, by
    default all of the prompt, 1 for what follows it.

    Raises:
        ValueError: if the model cannot be decoded token by token, `sampler` is unknown, or `constraints` ask for a
            source of tokens that the model does not have.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> tokens = keras.Input((None,), dtype="int32", name="token_ids")
    >>> x = kt.layers.PositionalEmbedding()(keras.layers.Embedding(50, 16)(tokens))
    >>> x = kt.layers.DecoderBlock(2, 32)(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(50)(x))
    >>> generator = kt.generation.Generator(model, end_id=2)
    >>> generator.generate([[5, 6, 7], [8]], max_new_tokens=6).shape
    (2, 6)
    """

    def __init__(
        self, model, start_id=None, end_id=None, pad_id=0, sampler="greedy", jit_compile="auto", constraints=None
    ):
        if isinstance(sampler, str) and sampler not in SAMPLERS:
            raise ValueError(f"`sampler` must be one of {sorted(SAMPLERS)} or a sampler; received sampler={sampler!r}.")
        if not isinstance(sampler, str) and not hasattr(sampler, "search"):
            raise ValueError(f"`sampler` must have a method `search`, as `Greedy()` has; received {sampler!r}.")
        self.graph = DecodingGraph(model)
        self.model = model
        self.start_id = start_id
        self.end_id = end_id
        self.pad_id = pad_id
        self.sampler = SAMPLERS[sampler]() if isinstance(sampler, str) else sampler
        self.constraints = constraints
        self.jit_compile = can_jit() if jit_compile == "auto" else jit_compile
        self._compiled = {}
        self._source_name = self._find_source()
        self._padded_sources = [name for name in self.graph.source_inputs if self._masks_padding(name)]
        self._check_cache()

    def generate(self, inputs, max_new_tokens):
        """Generates tokens for a batch.

        Args:
            inputs: dict from the model's input names to arrays, or to lists of lists of ints of different lengths. The
                prompt goes in under the name of the token input (`token_ids`, `target_ids`), and may be missing where
                there is a `start_id`. For a model with no other input the prompt alone will do.
            max_new_tokens: int. How many tokens to generate at most.

        Returns:
            int32 array of shape `[batch, max_new_tokens]`: what follows the prompt, the end token included, and
            `pad_id` after it.

        Raises:
            ValueError: if an input is missing, unknown or empty, prompt and new tokens together are longer than a
                learned position table, or a prompt has not as many placeholders as its image has vectors.
        """
        self._check_count(max_new_tokens)
        inputs = dict(inputs) if isinstance(inputs, dict) else {self.graph.token_input: inputs}
        self._check_names(inputs)
        self._add_source_masks(inputs)
        sources = {name: self._source_array(name, inputs[name]) for name in self.graph.source_inputs}
        prompt, real, segments = self._prompt_arrays(inputs, sources)
        rows = {name: len(x) for name, x in {**sources, self.graph.token_input: prompt}.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"`inputs` must have the same number of rows each; received {rows}.")
        batch = len(prompt)
        if batch == 0:
            return np.zeros((0, max_new_tokens), "int32")
        self._check_length(int(real.sum(axis=-1).max()) + max_new_tokens)
        self._check_placeholders(prompt)
        arrays = {**sources, "prompt": prompt, "real": real, "seed": np.asarray(self._seed(), "int32")}
        arrays |= {} if self.graph.segment_input is None else {"segments": segments}
        extra = bucket(batch, smallest=1, doubling_to=16) - batch
        arrays = {name: np.concatenate([x, x[:1].repeat(extra, 0)]) if x.ndim else x for name, x in arrays.items()}
        tensors = {name: ops.convert_to_tensor(x) for name, x in arrays.items()}
        return ops.convert_to_numpy(self._function(max_new_tokens, len(arrays["prompt"]))(tensors))[:batch]

    def generate_tensors(self, inputs, max_new_tokens, parameters=None):
        """Generates tokens inside a `tf.function`, for a SavedModel; sizes may be unknown until run time.

        Args:
            inputs: dict from the model's input names to tensors; prompts are padded with `pad_id` on either side.
            max_new_tokens: int. How many tokens to generate at most.
            parameters: dict of scalar tensors, all of `Sampling.PARAMETERS` and a `seed`, where the sampler is a
                `Sampling`, whose own they take the place of; or None.

        Returns:
            int32 tensor of shape `[batch, max_new_tokens]`.

        Raises:
            ValueError: if an input is missing or unknown, or the backend is not TensorFlow.
        """
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                "`generate_tensors` is for TensorFlow graphs; the backend here is "
                f"{keras.backend.backend()}. Use `generate`."
            )
        self._check_count(max_new_tokens)
        self._check_names(inputs)
        inputs = dict(inputs)
        self._add_source_masks(inputs)
        tensors = {name: ops.cast(inputs[name], x.dtype) for name, x in self.graph.source_inputs.items()}
        batch = ops.shape(next(iter(inputs.values())))[0]
        prompt = inputs.get(self.graph.token_input)
        if prompt is None:
            prompt = ops.full((batch, 1), self._start(), dtype="int32")
            real = ops.ones((batch, 1), "bool")
        else:
            real = inputs.get(self.graph.mask_input)
            real = prompt != self.pad_id if real is None else ops.cast(real, "bool")
            extra = bucket_tensor(ops.shape(prompt)[1], PROMPT_BUCKET) - ops.shape(prompt)[1]
            segments = inputs.get(self.graph.segment_input)
            if segments is not None:
                segments, _ = align_right(ops.cast(segments, "int32"), real, 0)
                tensors["segments"] = ops.pad(segments, ((0, 0), (extra, 0)))
            prompt, real = align_right(ops.cast(prompt, "int32"), real, self.pad_id)
            prompt = ops.pad(prompt, ((0, 0), (extra, 0)), constant_values=self.pad_id)
            real = ops.pad(real, ((0, 0), (extra, 0)), constant_values=False)
        for name in self._padded_sources:
            extra = bucket_tensor(ops.shape(tensors[name])[1], SOURCE_BUCKET) - ops.shape(tensors[name])[1]
            tensors[name] = ops.pad(tensors[name], ((0, 0), (0, extra)), constant_values=self._filler(name))
        tensors = {**tensors, "prompt": prompt, "real": real}
        if self.graph.segment_input is not None:
            tensors.setdefault("segments", ops.zeros_like(prompt))
        # The last row again and again fills the batch up; a batch without rows takes the one of zeros put behind.
        rows = ops.minimum(ops.arange(bucket_tensor(batch, 1)), ops.maximum(batch - 1, 0))
        tensors = {name: ops.pad(x, ((0, 1), *((0, 0),) * (len(x.shape) - 1))) for name, x in tensors.items()}
        tensors = {name: ops.take(x, rows, axis=0) for name, x in tensors.items()}
        tensors |= {"seed": self._seed_tensor()} if parameters is None else parameters
        return self._one_or_several(tensors, batch, max_new_tokens, parameters is not None)[:batch]

    def get_config(self):
        """What a generator is made of besides its model, as a dict that can be written as JSON."""
        return {
            "start_id": self.start_id,
            "end_id": self.end_id,
            "pad_id": self.pad_id,
            "sampler": keras.saving.serialize_keras_object(self.sampler),
            "jit_compile": self.jit_compile,
            "constraints": None if self.constraints is None else keras.saving.serialize_keras_object(self.constraints),
        }

    @classmethod
    def from_config(cls, model, config):
        """The generator that `get_config` described, for `model`."""
        parts = {
            name: None if config.get(name) is None else keras.saving.deserialize_keras_object(config[name])
            for name in ("sampler", "constraints")
        }
        return cls(model, **{**config, **parts})

    @classmethod
    def from_pretrained(cls, directory, model=None, **options):
        """A generator for a checkpoint in the Hugging Face layout, as its generation settings say.

        Args:
            directory: path of a directory with `config.json`, weights, and `generation_config.json` if there is one.
            model: the model, where it is loaded already; by default `kt.pretrained.load(directory)`.
            **options: arguments of `Generator`, which go before what the settings say.

        Raises:
            ValueError: if the settings ask for what there is none of here, with their names; or what `load` raises.

        Example:

        >>> import keras_transformer as kt
        >>> kt.generation.Generator.from_pretrained("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: ...
        """
        # Upwards to a room that stands on this one, and so only when it is asked for.
        from keras_transformer.pretrained import load
        from keras_transformer.pretrained.settings import generator_options

        options = {**generator_options(directory, chosen=options), **options}
        return cls(load(directory) if model is None else model, **options)

    def _function(self, max_new_tokens, batch=None, sampled=False):
        # One row is compiled apart: only where it is known that there are no others can its products be quick.
        rows = None if batch is None else batch * self._beams
        dtype = self.model.compute_dtype
        weights_first = bool(self.jit_compile) and StepProducts.weights_come_first(rows, max_new_tokens, dtype)
        key = (max_new_tokens, 1 if batch == 1 else None, sampled, weights_first)
        if key not in self._compiled:
            sources = {name: (x.shape[1:], x.dtype) for name, x in self.graph.source_inputs.items()}
            sources |= {"prompt": ((None,), "int32"), "real": ((None,), "bool")}
            sources |= {} if self.graph.segment_input is None else {"segments": ((None,), "int32")}
            tensors = {name: keras.KerasTensor((key[1], *shape), dtype) for name, (shape, dtype) in sources.items()}
            tensors["seed"] = keras.KerasTensor((), "int32")
            parameters = Sampling.PARAMETERS if sampled else {}
            tensors |= {name: keras.KerasTensor((), dtype) for name, dtype in parameters.items()}

            def loop(tensors):
                return self._loop(tensors, max_new_tokens, weights_first)

            self._compiled[key] = compile_function(loop, self.model.variables, tensors, self.jit_compile)
        return self._compiled[key]

    def _one_or_several(self, tensors, batch, max_new_tokens, sampled):
        """What the function for one row gives in a graph that is found to have one, else that for several."""
        several = self._function(max_new_tokens, sampled=sampled)
        differs = self.jit_compile or getattr(self.sampler, "prompt_lookup", 0)
        if self._beams > 1 or not differs:
            return several(tensors)
        one = self._function(max_new_tokens, 1, sampled)

        def known_as_one(x):
            return ops.reshape(x, (1, *ops.shape(x)[1:])) if len(x.shape) else x

        return ops.cond(
            ops.equal(batch, 1),
            lambda: one({name: known_as_one(x) for name, x in tensors.items()}),
            lambda: several(tensors),
        )

    def _loop(self, tensors, max_new_tokens, weights_first):
        """Encoder, prompt and loop: all that is compiled."""
        prompt, real, seed = (tensors[name] for name in ("prompt", "real", "seed"))
        boundary = self.graph.encode({name: tensors[name] for name in self.graph.source_inputs})
        length = ops.shape(prompt)[1]
        beams = self._beams
        looks_up = self._looks_up(prompt, max_new_tokens)
        grows = not looks_up and "stages" in inspect.signature(self.sampler.search).parameters
        stages = Stages(length, beams, max_new_tokens, grows)
        with DecodingScope(max_length=stages.room(stages.stops[0]), padding_mask=real) as scope:
            logits = self.graph.decode(prompt, boundary, tensors.get("segments"), last=True)[:, 0]
        new = ops.full((ops.shape(prompt)[0], max_new_tokens), self.pad_id, dtype="int32")
        history = History(prompt, real, new, ops.convert_to_tensor(0, "int32"), *self._source(tensors))
        later = history.repeated(beams)
        products = StepProducts(self.graph, weights_first) if StepProducts.pay(self.jit_compile) else None

        def scores_of(logits, history):
            scores = ops.cast(logits, "float32")
            # Constraints leave the probabilities of what is allowed as they are, so sums of them need these first.
            scores = ops.log_softmax(scores, axis=-1) if isinstance(self.sampler, BeamSearch) else scores
            if self.constraints is None:
                return scores
            return self.constraints.apply(scores, history, self.end_id)

        def step(tokens, count, cache, origins=None, ahead=None):
            places = count + ops.arange(1 + (ahead or 0), dtype="int32")
            last = ops.take(tokens, places, axis=1)  # [B, 1 + ahead], or of all beams one after the other
            last = ops.reshape(last, (-1, beams)) if ahead is None else last
            branches = None if origins is None else Branches(length, origins, count + 1)
            with DecodingScope(cache, length + count, branches=branches, products=products) as scope:
                logits = self.graph.decode(last, boundary)
            if ahead is not None:
                scores = [scores_of(logits[:, i], later.then(tokens, count + 1 + i)) for i in range(1 + ahead)]
                return ops.stack(scores, axis=1), scope.cache
            logits = ops.reshape(logits, (-1, logits.shape[-1]))
            return scores_of(logits, later.then(tokens, count + 1)), scope.cache

        scores = scores_of(logits, history)
        sampler = self.sampler if "temperature" not in tensors else self.sampler.with_parameters(tensors)
        options = {"stages": stages} if grows else {"history": history} if looks_up else {}
        return sampler.search(step, scores, scope.cache, max_new_tokens, self.end_id, self.pad_id, seed, **options)

    def _looks_up(self, prompt, max_new_tokens):
        """Whether tokens are proposed: to a single row, with room for a step that reads them."""
        count = getattr(self.sampler, "prompt_lookup", 0)
        positions = [getattr(layer, "position", None) for layer in self.graph.decoder_layers()]
        # Their angles depend on how many tokens there are so far, which tokens of one step cannot differ in.
        growing = any(getattr(position, "depends_on_length", False) for position in positions)
        return 0 < count < max_new_tokens - 1 and prompt.shape[0] == 1 and not growing

    def _source(self, tensors):
        """The tokens that the encoder reads and which are real, or the prompt where there is no encoder."""
        if self._source_name is None:
            return tensors["prompt"], tensors["real"]
        ids, mask = tensors[self._source_name], mask_name(self._source_name)
        return ids, ops.cast(tensors[mask], "bool") if mask in tensors else ids != self.pad_id

    @property
    def _beams(self):
        return getattr(self.sampler, "width", 1)

    def _seed(self):
        seed = getattr(self.sampler, "seed", 0)
        return np.random.randint(2**31 - 1) if seed is None else seed

    def _seed_tensor(self):
        if getattr(self.sampler, "seed", 0) is not None:
            return ops.convert_to_tensor(self._seed(), "int32")
        import tensorflow as tf  # A graph is made once: it has to draw the seeds of its calls itself.

        return tf.random.uniform((), maxval=2**31 - 1, dtype="int32")

    def _start(self):
        if self.start_id is None:
            raise ValueError(
                f"`inputs` must have a prompt under {self.graph.token_input!r}, or the generator a `start_id`; "
                "received neither."
            )
        return self.start_id

    def _add_source_masks(self, inputs):
        """Says which tokens of a source are real, where the model asks and the caller does not tell."""
        for name in self.graph.source_inputs:
            mask = mask_name(name)
            if mask in self.graph.source_inputs and mask not in inputs:
                values = inputs[name]
                if is_ragged(values):
                    inputs[mask] = pad_rows([[1] * len(row) for row in values], 0)
                else:
                    inputs[mask] = ops.cast(ops.not_equal(ops.convert_to_tensor(values), self.pad_id), "int32")

    def _filler(self, name):
        """What fills up a source that is padded: an id, or 0 in the mask of one."""
        masks = [mask_name(other) for other in self.graph.source_inputs]
        return 0 if name in masks else self.pad_id

    def _source_array(self, name, values):
        x = self.graph.source_inputs[name]
        if is_ragged(values):
            values = pad_rows(values, self._filler(name))
        array = np.asarray(ops.convert_to_numpy(values)).astype(x.dtype)
        if name in self._padded_sources:
            extra = bucket(array.shape[1], SOURCE_BUCKET) - array.shape[1]
            array = np.pad(array, ((0, 0), (0, extra)), constant_values=self._filler(name))
        return array

    def _prompt_arrays(self, inputs, sources):
        """Prompts as int32 [B, P], padded on the left, which of it is real, and its segments."""
        prompt, mask = inputs.get(self.graph.token_input), inputs.get(self.graph.mask_input)
        if prompt is None:
            start = self._start()
            batch = len(next(iter(sources.values()))) if sources else 1
            return np.full((batch, 1), start, "int32"), np.ones((batch, 1), bool), np.zeros((batch, 1), "int32")
        if is_ragged(prompt):
            kept = [slice(None)] * len(prompt)
            rows = [list(row) for row in prompt]
        else:
            array = np.asarray(ops.convert_to_numpy(prompt))
            if array.ndim != 2:
                raise ValueError(
                    f"`inputs[{self.graph.token_input!r}]` must have shape (batch, length); received {array.shape}."
                )
            if mask is None:
                kept = [slice(*real_span(row, self.pad_id)) for row in array]
            else:
                kept = list(np.asarray(mask).astype(bool))
            rows = [row[keep] for row, keep in zip(array, kept, strict=True)]
        if any(len(row) == 0 for row in rows):
            if self.start_id is None:
                raise ValueError(
                    f"`inputs[{self.graph.token_input!r}]` must have a token in each row, as there is no `start_id`; "
                    f"row {[len(row) for row in rows].index(0)} is empty."
                )
            rows = [row if len(row) else [self.start_id] for row in rows]
        lengths = np.array([len(row) for row in rows], "int32").reshape(-1, 1)
        length = bucket(int(lengths.max(initial=1)), PROMPT_BUCKET)
        tokens = left_padded(rows, length, self.pad_id)
        return tokens, np.arange(length)[None] >= length - lengths, self._segments(inputs, kept, rows, length)

    def _segments(self, inputs, kept, rows, length):
        """The segments of prompts, int32 [B, P]: all in the prefix unless `inputs` say otherwise."""
        given = inputs.get(self.graph.segment_input)
        if given is None:
            return np.zeros((len(rows), length), "int32")
        segments = [np.asarray(row)[keep] for row, keep in zip(given, kept, strict=True)]
        if [len(row) for row in segments] != [len(row) for row in rows]:
            raise ValueError(
                f"`inputs[{self.graph.segment_input!r}]` must have a number for each token of the prompts, "
                f"{[len(row) for row in rows]}; received {[len(row) for row in segments]}."
            )
        return left_padded(segments, length, 0)

    def _masks_padding(self, name):
        """Whether padding this source further changes nothing: it is masked where it is embedded."""
        x = self.graph.source_inputs[name]
        names = self.graph.source_inputs
        if mask_name(name) in names or name in [mask_name(other) for other in names]:
            return x.shape[1] is None
        consumers = self.graph.consumers(name)
        embeds = [isinstance(layer, keras.layers.Embedding) for layer in consumers]
        masked = any(embeds) and all(layer.mask_zero for layer, is_one in zip(consumers, embeds, strict=True) if is_one)
        return self.pad_id == 0 and len(x.shape) == 2 and x.shape[1] is None and masked

    def _find_source(self):
        """Name of the source that constraints hold the new tokens against, or None for the prompt."""
        names = self.graph.source_inputs
        masks = [mask_name(name) for name in names]
        found = [name for name, x in names.items() if "int" in x.dtype and len(x.shape) == 2 and name not in masks]
        asked = 0 if self.constraints is None else self.constraints.no_repeat_source_ngram_size
        if asked and len(found) != 1 and (found or self.graph.token_input == "target_ids"):
            raise ValueError(
                f"`no_repeat_source_ngram_size`={asked} of `constraints` needs a model with one source of tokens; "
                f"received one with the inputs {sorted(names)}."
            )
        return found[0] if len(found) == 1 else None

    def _check_names(self, inputs):
        beside = (self.graph.mask_input, self.graph.segment_input)
        known = {*self.graph.source_inputs, self.graph.token_input, *beside} - {None}
        masks = {mask_name(name) for name in self.graph.source_inputs}
        missing, unknown = set(self.graph.source_inputs) - set(inputs) - masks, set(inputs) - known
        if missing or unknown:
            raise ValueError(
                f"`inputs` must have {sorted(self.graph.source_inputs)} and may have a prompt as "
                f"{self.graph.token_input!r}; received {sorted(inputs)}."
            )

    @staticmethod
    def _check_count(max_new_tokens):
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a positive int; received {max_new_tokens!r}.")

    def _check_length(self, length):
        for layer in self.graph.decoder_layers():
            # The last new token is never read, so it needs no position.
            if (
                isinstance(layer, PositionalEmbedding)
                and layer.max_length is not None
                and length - 1 > layer.max_length
            ):
                raise ValueError(
                    f"Prompt and `max_new_tokens` together have {length} tokens, but `{layer.name}` has "
                    f"max_length={layer.max_length} positions, enough for {layer.max_length + 1} tokens."
                )

    def _check_placeholders(self, prompt):
        for layer in self.graph.decoder_layers():
            if isinstance(layer, Placeholders):
                counts = (prompt == layer.token_id).sum(axis=-1)
                if (counts != layer.count).any():
                    raise ValueError(
                        f"`inputs[{self.graph.token_input!r}]` must have the token {layer.token_id} for each of the "
                        f"{layer.count} vectors of an image, in each row; received {counts.tolist()} of them."
                    )

    def _check_cache(self):
        """Holds cached steps of the model to the same without a cache, once, so that what mixes positions shows."""
        if self.model in _checked:
            return
        sources = {name: probe(x) for name, x in self.graph.source_inputs.items()}
        length = min(
            [4, *(layer.max_length for layer in self.graph.decoder_layers() if getattr(layer, "max_length", None))]
        )
        if length < 2:
            return
        tokens = ops.ones((1, length), "int32")

        def logits_of(sources):
            boundary = self.graph.encode(sources)
            whole = self.graph.decode(tokens, boundary)
            with DecodingScope(max_length=length) as scope:
                start = self.graph.decode(tokens[:, : length - 1], boundary)
            with DecodingScope(scope.cache, length - 1):
                end = self.graph.decode(tokens[:, length - 1 :], boundary)
            return [ops.cast(x, "float32") for x in (whole, start, end)]

        logits = run_once(logits_of, self.model.variables, sources)
        whole, start, end = (np.asarray(ops.convert_to_numpy(x)) for x in logits)
        cached = np.concatenate([start, end], axis=1)
        half = keras.backend.standardize_dtype(self.model.compute_dtype) in ("float16", "bfloat16")
        difference = np.abs(cached - whole).max()
        if not difference <= (0.1 if half else 1e-3) * max(1.0, np.abs(whole).max()):
            raise ValueError(
                f"`model` cannot be decoded token by token: its logits differ by {difference:.2g} between "
                f"one call with {length} tokens and two calls with a cache. Something besides causal attention mixes "
                f"positions of `{self.graph.token_input}`."
            )
        _checked.add(self.model)
