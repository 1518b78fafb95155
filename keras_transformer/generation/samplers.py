"""How the next token is chosen. A sampler knows nothing of models: only scores, and a function that gives the next."""

import copy

import keras
from keras import ops

from keras_transformer.generation.constraints import end_tokens, is_one_of
from keras_transformer.generation.prompt_lookup import search_with_lookup
from keras_transformer.ops.hashing import hashed_bits
from keras_transformer.ops.looping import compiled_by_xla_for_cpu
from keras_transformer.ops.selection import largest_that_covers


class TokenSampler:
    """One sequence a row, one token a step: what greedy decoding and sampling share.

    Subclasses choose a token for each row in `choose`, and say in `get_config` what they were made with.
    """

    max_new_tokens = None  # A tensor, where a call wants fewer than there is room for.

    def choose(self, logits, seed):
        """Tokens `[B]` for logits `[B, vocabulary]`; `seed` is a `keras.random.SeedGenerator` of this step."""
        raise NotImplementedError

    def search(self, step, logits, cache, max_new_tokens, end_id, pad_id, seed, stages=None):
        """Generates `max_new_tokens` tokens after a prompt.

        Args:
            step: function of the new tokens `[B, max_new_tokens]` so far, the number of the last of them (0 for the
                first) and a cache, to the logits `[B, vocabulary]` for the next tokens and the new cache.
            logits: float tensor `[B, vocabulary]`, for the first new token.
            cache: nested dict of tensors with rows along axis 0.
            max_new_tokens: int.
            end_id: int, sequence of ints or None. The token, or tokens, after which a row has ended.
            pad_id: int. What fills a row after its end.
            seed: scalar int tensor.
            stages: `Stages` of a cache that grows, or None for one that has room for all tokens. Only a sampler whose
                `search` has this argument is handed a cache that grows.

        Returns:
            int32 tensor `[B, max_new_tokens]`.
        """
        rows = ops.shape(logits)[0]
        limit = max_new_tokens if self.max_new_tokens is None else ops.minimum(self.max_new_tokens, max_new_tokens)

        def append(i, logits, tokens, ended):
            chosen = ops.cast(self.choose(logits, StepSeed(seed, i)), "int32")
            chosen = ops.where(ended, ops.cast(pad_id, "int32"), chosen)
            tokens = ops.slice_update(tokens, (0, i), ops.expand_dims(chosen, 1))
            return tokens, ops.logical_or(ended, is_one_of(chosen, end_tokens(end_id)))

        def unfinished(i, tokens, ended, cache):
            return ops.logical_and(i < limit, ops.logical_not(ops.all(ended)))

        def next_token(i, tokens, ended, cache):
            logits, cache = step(tokens, i - 1, cache)
            return (i + 1, *append(i, logits, tokens, ended), cache)

        tokens = ops.full((rows, max_new_tokens), pad_id, dtype="int32")
        first = append(ops.convert_to_tensor(0, "int32"), logits, tokens, ops.zeros((rows,), "bool"))
        state = (ops.convert_to_tensor(1, "int32"), *first, cache)
        loop = ops.while_loop if stages is None else stages.loop
        return loop(unfinished, next_token, state)[1]

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_transformer")
class Greedy(TokenSampler):
    """Takes the most probable token at each step.

    A row that has written the same before will often go on the same: with `prompt_lookup` what followed then is
    proposed, and one step checks all of it (prompt-lookup decoding). The tokens are the same with it and without,
    only that products of several tokens round otherwise than those of one, which can decide between two that are
    equally probable to the last digits. It pays for a single row that copies much, such as a text that is edited, by a
    model that is larger than the processor's caches. A batch of several rows, and a model whose rotary angles depend on
    the length go on token by token.

    Args:
        prompt_lookup: int. How many tokens are proposed at a time; 0 for none.
        ngram_size: int. How many of the last tokens must have come before for what followed them to be proposed.

    Raises:
        ValueError: if `prompt_lookup` is negative, or `ngram_size` is not positive.

    References: [Prompt Lookup Decoding](https://github.com/apoorvumang/prompt-lookup-decoding) for what is proposed;
    [Fast Inference from Transformers via Speculative Decoding](https://arxiv.org/abs/2211.17192) for how it is checked.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.transformer(20, 20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> generator = kt.generation.Generator(model, start_id=1, end_id=2, sampler=kt.generation.Greedy())
    >>> generator.generate({"source_ids": [[5, 6, 7], [8]]}, max_new_tokens=4).shape
    (2, 4)
    """

    def __init__(self, prompt_lookup=0, ngram_size=3):
        if not isinstance(prompt_lookup, int) or prompt_lookup < 0:
            raise ValueError(f"`prompt_lookup` must be an int of 0 or more; received prompt_lookup={prompt_lookup!r}.")
        if not isinstance(ngram_size, int) or ngram_size < 1:
            raise ValueError(f"`ngram_size` must be a positive int; received ngram_size={ngram_size!r}.")
        self.prompt_lookup = prompt_lookup
        self.ngram_size = ngram_size

    def choose(self, logits, seed):
        return ops.argmax(logits, axis=-1)

    def search(self, step, logits, cache, max_new_tokens, end_id, pad_id, seed, stages=None, history=None):
        if history is None:
            return super().search(step, logits, cache, max_new_tokens, end_id, pad_id, seed, stages)
        return search_with_lookup(self, step, logits, cache, history, max_new_tokens, end_id, pad_id)

    def get_config(self):
        return {"prompt_lookup": self.prompt_lookup, "ngram_size": self.ngram_size}


@keras.saving.register_keras_serializable(package="keras_transformer")
class Sampling(TokenSampler):
    """Draws each token from the model's distribution, sharpened and cut off as asked, in this order.

    Args:
        temperature: float. Logits are divided by it: below 1 favours the probable tokens.
        top_k: int. Only the `top_k` most probable tokens can be drawn; None for all.
        top_p: float. Only the most probable tokens can be drawn, as few as have `top_p` of the probability together
            (nucleus sampling); None for all.
        seed: int. The same seed draws the same tokens; None for new ones in each call.
        min_p: float. Only tokens can be drawn that have this share of the most probable token's probability; None for
            all.
        typical_p: float. Only tokens can be drawn whose information is the closest to what is expected, as few as have
            `typical_p` of the probability together (locally typical sampling); None for all.

    Raises:
        ValueError: if an argument is out of range.

    References: [The Curious Case of Neural Text Degeneration](https://arxiv.org/abs/1904.09751), section 3.1, for
    `top_p`; [Min-p Sampling](https://arxiv.org/abs/2407.01082); [Locally Typical
    Sampling](https://arxiv.org/abs/2202.00666), equation 10.

    Example:

    >>> import keras_transformer as kt
    >>> kt.generation.Sampling(temperature=0.8, top_k=40, seed=1).get_config()
    {'temperature': 0.8, 'top_k': 40, 'top_p': None, 'seed': 1, 'min_p': None, 'typical_p': None}
    """

    # What a call may bring as scalar tensors: `top_k` of 0 and `top_p` of 1 are for all tokens.
    PARAMETERS = {"temperature": "float32", "top_k": "int32", "top_p": "float32", "max_new_tokens": "int32"}

    def __init__(self, temperature=1.0, top_k=None, top_p=None, seed=None, min_p=None, typical_p=None):
        if temperature <= 0:
            raise ValueError(
                f"`temperature` must be positive; received {temperature}. For no randomness use `Greedy()`."
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1; received top_k={top_k}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be greater than 0 and at most 1; received top_p={top_p}.")
        if min_p is not None and not 0 <= min_p <= 1:
            raise ValueError(f"`min_p` must be from 0 to 1; received min_p={min_p}.")
        if typical_p is not None and not 0 < typical_p <= 1:
            raise ValueError(f"`typical_p` must be greater than 0 and at most 1; received typical_p={typical_p}.")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seed = seed
        self.min_p = min_p
        self.typical_p = typical_p

    def choose(self, logits, seed):
        logits = self.cut(logits / self.temperature)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        return ops.argmax(logits - ops.log(-ops.log1p(-uniform(ops.shape(logits), seed))), axis=-1)

    def cut(self, logits):
        """Logits `[B, vocabulary]` with those of tokens that cannot be drawn at -1e30."""
        size = logits.shape[-1]
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < size):
            logits = ops.where(logits < self._least_of_top_k(logits), -1e30, logits)
        if self.top_p is not None and (not isinstance(self.top_p, float | int) or self.top_p < 1):
            logits = ops.where(logits < self._least_of_top_p(logits), -1e30, logits)
        if self.min_p:
            probabilities = ops.softmax(logits, axis=-1)
            least = self.min_p * ops.max(probabilities, axis=-1, keepdims=True)
            logits = ops.where(probabilities < least, -1e30, logits)
        if self.typical_p is not None and self.typical_p < 1:
            logits = ops.where(self._is_typical(logits), logits, -1e30)
        return logits

    def _least_of_top_k(self, logits):
        """The lowest logit `[B, 1]` of those that `top_k`, a number or a tensor, leaves."""
        size, count, by_bits = logits.shape[-1], self.top_k, compiled_by_xla_for_cpu()
        if isinstance(count, int) and not by_bits:
            return ops.top_k(logits, count)[0][:, -1:]
        if not isinstance(count, int):
            count = ops.where(count > 0, ops.minimum(count, size), size)
        if by_bits:
            return largest_that_covers(logits, 1.0, ops.cast(count, "float32"))
        return ops.take(ops.sort(logits, axis=-1), ops.reshape(size - count, (1,)), axis=-1)

    def _least_of_top_p(self, logits):
        """The lowest logit `[B, 1]` of those that `top_p`, a number or a tensor, leaves."""
        everything = ops.convert_to_tensor(self.top_p) >= 1
        if compiled_by_xla_for_cpu():
            return largest_that_covers(logits, ops.softmax(logits, axis=-1), ops.where(everything, 2.0, self.top_p))
        descending = ops.flip(ops.sort(logits, axis=-1), axis=-1)
        probabilities = ops.softmax(descending, axis=-1)
        before = ops.cumsum(probabilities, axis=-1) - probabilities
        kept = ops.logical_or(before < self.top_p, everything)
        return ops.min(ops.where(kept, descending, float("inf")), axis=-1, keepdims=True)

    def with_parameters(self, tensors):
        """This sampler with parameters out of a dict of scalar tensors in the place of its own."""
        sampler = copy.copy(self)
        for name in self.PARAMETERS:
            setattr(sampler, name, tensors[name])
        return sampler

    def _is_typical(self, logits):
        """Which tokens are among the most typical that have `typical_p` of the probability together."""
        probabilities = ops.softmax(logits, axis=-1)
        information = -ops.log_softmax(logits, axis=-1)
        entropy = ops.sum(probabilities * information, axis=-1, keepdims=True)
        surprise = ops.abs(information - entropy)
        order = ops.argsort(surprise, axis=-1)
        ascending = ops.take_along_axis(surprise, order, axis=-1)
        together = ops.cumsum(ops.take_along_axis(probabilities, order, axis=-1), axis=-1)
        # The token with which they have that much is the last one.
        before = ops.pad(together, ((0, 0), (1, 0)))[:, :-1]
        most = ops.max(ops.where(before < self.typical_p, ascending, -1.0), axis=-1, keepdims=True)
        return surprise <= most

    def get_config(self):
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
        }


def uniform(shape, seed):
    """Random numbers above 0 and below 1, by bits that cost less where XLA compiles for a CPU."""
    if not compiled_by_xla_for_cpu():
        return keras.random.uniform(shape, minval=1e-20, maxval=1.0, dtype="float32", seed=seed)
    numbers = (ops.cast(hashed_bits(seed.next(), shape), "float32") + 0.5) * 2**-32
    return ops.minimum(numbers, 1 - 2**-24)


class StepSeed(keras.random.SeedGenerator):
    """The seed of one step: made from tensors, so that a compiled loop draws anew at each step."""

    def __init__(self, seed, step):
        self._seeds = (seed, step)

    def next(self, ordered=True):
        dtype = "uint32" if keras.backend.backend() == "jax" else "int64"
        return ops.stack([ops.cast(x, dtype) for x in self._seeds])
