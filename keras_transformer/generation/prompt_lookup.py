"""Several tokens a step: what a row has written before is proposed again, and the model checks it all at once."""

from keras import ops

from keras_transformer.generation.constraints import end_tokens, is_one_of


def search_with_lookup(sampler, step, logits, cache, history, max_new_tokens, end_id, pad_id):
    """Generates the tokens of greedy decoding for one row, in fewer steps where the row repeats itself.

    Where the last `sampler.ngram_size` tokens have come before, the `sampler.prompt_lookup` tokens that followed them
    are proposed. One step reads them all: of its tokens those count that agree with what was proposed, and the first
    that does not. What the cache keeps of the others lies behind the row's end, where causal attention does not look,
    until later tokens take its place.

    Args:
        step: function of the new tokens `[1, max_new_tokens]` so far, the number of one of them, a cache, and how many
            tokens after this one to read with it, to the logits `[1, 1 + ahead, vocabulary]` for the tokens next to
            each, and the new cache.
        logits: float tensor `[1, vocabulary]`, for the first new token.
        cache: nested dict of tensors.
        history: `History` of the prompt.
        max_new_tokens: int, greater than `sampler.prompt_lookup + 1`.
        end_id: int, sequence of ints or None. The token, or tokens, after which the row has ended.
        pad_id: int. What fills the row after its end.

    Returns:
        int32 tensor `[1, max_new_tokens]`.
    """
    ahead = sampler.prompt_lookup

    def append(i, tokens, logits, proposed):
        """Appends the tokens that `logits` [1, 1 + P, vocabulary] tell from the i-th on, if `proposed` [1, P] agree."""
        chosen = ops.cast(sampler.choose(logits, None), "int32")
        is_end = is_one_of(chosen, end_tokens(end_id))
        goes_on = ops.logical_and(chosen[:, :-1] == proposed, ops.logical_not(is_end[:, :-1]))
        taken = ops.cumprod(ops.pad(ops.cast(goes_on, "int32"), ((0, 0), (1, 0)), constant_values=1), axis=1)
        is_taken = ops.cast(taken, "bool")
        tokens = ops.slice_update(tokens, (0, i), ops.where(is_taken, chosen, ops.cast(pad_id, "int32")))
        ended = ops.any(ops.logical_and(is_taken, is_end))
        i = i + ops.cast(ops.sum(taken), "int32")
        # A step that reads on beyond the last token would have no room: the last tokens come one by one.
        found, proposed = propose(history.then(tokens, i), sampler.ngram_size, ahead)
        return i, tokens, ended, ops.logical_and(found, i + ahead < max_new_tokens), proposed

    def read_on(count):
        def body(i, tokens, ended, found, proposed, cache):
            proposed = proposed[:, :count]
            read = ops.slice_update(tokens, (0, i), proposed) if count else tokens
            logits, cache = step(read, i - 1, cache, ahead=count)
            return (*append(i, tokens, logits, proposed), cache)

        return body

    def unfinished(i, tokens, ended, *_):
        return ops.logical_and(i < max_new_tokens, ops.logical_not(ended))

    def finds(i, tokens, ended, found, *_):
        return ops.logical_and(unfinished(i, tokens, ended), found)

    def finds_nothing(i, tokens, ended, found, *_):
        return ops.logical_and(unfinished(i, tokens, ended), ops.logical_not(found))

    def both(*state):
        # Two loops in turn rather than a branch, which would copy the cache.
        state = ops.while_loop(finds_nothing, read_on(0), state)
        return ops.while_loop(finds, read_on(ahead), state)

    tokens = ops.full((1, max_new_tokens), pad_id, dtype="int32")
    nothing = ops.zeros((1, 0), "int32")
    state = append(ops.convert_to_tensor(0, "int32"), tokens, ops.expand_dims(logits, 1), nothing)
    return ops.while_loop(unfinished, both, (*state, cache))[1]


def propose(history, size, count):
    """What followed the last `size` tokens of a row where they came before, if they did.

    Of several places the last is taken. A row that has come only so far since then is taken to go on in a circle.

    Args:
        history: `History` of one row.
        size: int. How many tokens must be the same.
        count: int. How many tokens to propose.

    Returns:
        Whether there is such a place, and int tensor `[1, count]`.
    """
    following = history.following(size)[0]
    place = ops.max(ops.where(following, ops.arange(ops.shape(following)[0], dtype="int32"), -1))
    since = ops.shape(history.prompt)[1] + history.count - place
    places = place + ops.arange(count, dtype="int32") % since
    return place >= 0, ops.take(history.tokens, ops.maximum(places, 0), axis=1)
