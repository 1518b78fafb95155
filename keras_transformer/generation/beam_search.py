import keras
from keras import ops

from keras_transformer.generation.constraints import end_tokens, is_one_of

LOWEST = -1e30


@keras.saving.register_keras_serializable(package="keras_transformer")
class BeamSearch:
    """Keeps the `width` most probable beginnings at each step, and returns the best whole sequence found.

    Sequences of different lengths compare by the sum of their log-probabilities, divided by the length (the end token
    counted) to the power of `length_penalty`. A row stops when it has `width` whole sequences and the best beginning,
    at its present length, is no better than the worst of these. Where long sequences are favoured, it could become
    better; `early_stopping` decides how much is tried.

    Args:
        width: int. Number of beams.
        length_penalty: float. 0 compares sums, which favours short sequences; 1 compares means.
        early_stopping: boolean, or `"never"`. True stops a row as soon as it has `width` whole sequences; `"never"`
            compares the best beginning at the greatest length it may have, where `length_penalty` is positive.

    Raises:
        ValueError: if `width` is less than 1, or `early_stopping` is none of the three.

    Reference: [Google's Neural Machine Translation System](https://arxiv.org/abs/1609.08144), section 7, with the plain
    power of the length that fairseq and Hugging Face use.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.transformer(20, 20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> generator = kt.generation.Generator(model, start_id=1, end_id=2, sampler=kt.generation.BeamSearch(4))
    >>> generator.generate({"source_ids": [[5, 6, 7], [8]]}, max_new_tokens=4).shape
    (2, 4)
    """

    def __init__(self, width, length_penalty=1.0, early_stopping=False):
        if width < 1:
            raise ValueError(f"`width` must be at least 1 beam; received width={width}.")
        if early_stopping != "never" and not isinstance(early_stopping, bool):
            raise ValueError(f"`early_stopping` must be True, False or 'never'; received {early_stopping!r}.")
        self.width = width
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping

    def search(self, step, logits, cache, max_new_tokens, end_id, pad_id, seed, stages=None):
        """Generates `max_new_tokens` tokens after a prompt; arguments as in `TokenSampler.search`.

        What `step` returns, and `logits`, are log-probabilities here: the scores of a beam are their sums. `step` is
        also told which beam of each earlier step a beam goes back to, `[B, width, max_new_tokens]`: the cache keeps
        all of them where they are, as copying it for each step would take as long as the step.
        """
        width = self.width
        rows, vocabulary = ops.shape(logits)[0], logits.shape[-1]
        logits = ops.repeat(logits, width, axis=0)
        # All beams begin alike: only the first counts, until they differ.
        only_first = ops.where(ops.arange(width) == 0, 0.0, LOWEST)
        live = {
            "tokens": ops.full((rows, width, max_new_tokens), pad_id, dtype="int32"),
            "scores": ops.broadcast_to(ops.expand_dims(only_first, 0), (rows, width)),
        }
        whole = {
            "tokens": ops.full((rows, width, max_new_tokens), pad_id, dtype="int32"),
            "scores": ops.full((rows, width), 2 * LOWEST, dtype="float32"),
        }

        def advance(i, logits, live, whole, done):
            """Adds the next tokens: the new live and whole sequences, and which beams the live ones come from."""
            candidates = ops.expand_dims(live["scores"], -1) + ops.reshape(logits, (rows, width, vocabulary))
            # Of each beam all end tokens at most can be among them, so that `width` others are left.
            count = min((1 + max(1, len(end_tokens(end_id)))) * width, width * vocabulary)
            scores, places = ops.top_k(ops.reshape(candidates, (rows, width * vocabulary)), count)
            places = ops.cast(places, "int32")
            beams, chosen = places // vocabulary, places % vocabulary  # [B, count]
            tokens = take_beams(live["tokens"], beams)
            tokens = ops.slice_update(tokens, (0, 0, i), ops.expand_dims(chosen, -1))
            ends = ops.broadcast_to(i == max_new_tokens - 1, (rows, count))
            ends = ops.logical_or(ends, is_one_of(chosen, end_tokens(end_id)))

            among_best = ops.expand_dims(ops.arange(count) < width, 0)
            real = ops.logical_and(ends, ops.logical_and(among_best, scores > LOWEST / 2))
            length = ops.cast(i + 1, "float32")
            final = ops.where(real, scores / length**self.length_penalty, 2 * LOWEST)
            pool = {
                "tokens": ops.concatenate([whole["tokens"], tokens], axis=1),
                "scores": ops.concatenate([whole["scores"], final], axis=1),
            }
            best, order = ops.top_k(pool["scores"], width)
            still = ops.expand_dims(done, -1)
            kept = take_beams(pool["tokens"], ops.cast(order, "int32"))
            whole = {
                "tokens": ops.where(ops.expand_dims(still, -1), whole["tokens"], kept),
                "scores": ops.where(still, whole["scores"], best),
            }
            going, order = ops.top_k(ops.where(ends, 2 * LOWEST, scores), width)
            order = ops.cast(order, "int32")
            live = {"tokens": take_beams(tokens, order), "scores": going}
            worst = whole["scores"][:, -1]
            full = worst > LOWEST
            if self.early_stopping is not True:
                longest = self.early_stopping == "never" and self.length_penalty > 0
                length = float(max_new_tokens) if longest else length
                full = ops.logical_and(full, worst >= going[:, 0] / length**self.length_penalty)
            origins = ops.take_along_axis(beams, order, axis=1)
            return origins, live, whole, ops.logical_or(done, full)

        def unfinished(i, beams, history, live, whole, done, cache):
            return ops.logical_and(i < max_new_tokens, ops.logical_not(ops.all(done)))

        def next_tokens(i, beams, history, live, whole, done, cache):
            own = ops.broadcast_to(ops.reshape(ops.arange(width, dtype="int32"), (1, width, 1)), (rows, width, 1))
            history = ops.slice_update(take_beams(history, beams), (0, 0, i - 1), own)
            logits, cache = step(ops.reshape(live["tokens"], (-1, max_new_tokens)), i - 1, cache, history)
            beams, live, whole, done = advance(i, logits, live, whole, done)
            return i + 1, beams, history, live, whole, done, cache

        beams, *rest = advance(ops.convert_to_tensor(0, "int32"), logits, live, whole, ops.zeros((rows,), "bool"))
        history = ops.zeros((rows, width, max_new_tokens), "int32")
        state = (ops.convert_to_tensor(1, "int32"), beams, history, *rest, cache)
        loop = ops.while_loop if stages is None else stages.loop
        whole = loop(unfinished, next_tokens, state)[4]
        return whole["tokens"][:, 0]

    def get_config(self):
        return {
            "width": self.width,
            "length_penalty": self.length_penalty,
            "early_stopping": self.early_stopping,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def take_beams(x, beams):
    """`[B, beams, N]` at the beams `[B, count]`: `[B, count, N]`."""
    return ops.take_along_axis(x, ops.expand_dims(beams, -1), axis=1)
