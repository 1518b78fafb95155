"""Batches of about equally long texts: pairs, measured in tokens, and labelled texts, by the number."""

import itertools

import numpy as np
import tensorflow as tf
from keras.utils import pad_sequences


def token_batches(
    source_ids,
    target_ids,
    tokens_per_batch,
    shuffle=True,
    seed=0,
    first_epoch=0,
    length_multiple=4,
    start_id=1,
    end_id=2,
    pad_id=0,
):
    """Groups token ids of translation pairs into padded batches of about equal cost.

    Pairs of similar length share a batch, and a batch holds as many pairs as fit `tokens_per_batch`, as in section
    5.1 of [Attention Is All You Need](https://arxiv.org/abs/1706.03762). The batches are for teacher forcing: the
    source ends with `end_id`, the decoder reads `start_id` and the target, and is to say the target and `end_id`.

    Lengths are padded up to multiples of `length_multiple`, so that a compiled step meets few shapes. Every pass over
    the dataset is one epoch: each pair comes exactly once, pairs of one padded length change places, and the batches
    come in a new order. The number of batches is the same in each epoch and is the dataset's cardinality.

    Args:
        source_ids: List of integer sequences, one for each source sentence, without start or end.
        target_ids: List of integer sequences, one for each target sentence, without start or end.
        tokens_per_batch: Integer. The largest number of tokens, padding included, on either side of a batch.
        shuffle: Boolean. Whether to change the order in each epoch; otherwise it goes from short to long.
        seed: Integer. The same seed gives the same epochs.
        first_epoch: Integer. The number of the epoch that the first pass gives: a resumed training continues with
            the batches that an uninterrupted one would see.
        length_multiple: Integer. Padded lengths are multiples of this.
        start_id: Integer. The id that begins a target.
        end_id: Integer. The id that ends a sentence.
        pad_id: Integer. The id that fills a batch.

    Returns:
        A `tf.data.Dataset` of `({"source_ids": ..., "target_ids": ...}, labels)`, each int32 `[batch, length]`.

    Raises:
        ValueError: If the two sides differ in number, are empty, or if a pair alone exceeds `tokens_per_batch`.

    Example:

    >>> batches = token_batches([[5, 6], [7]], [[8], [9, 10]], tokens_per_batch=8, length_multiple=1)
    >>> inputs, labels = next(iter(batches))
    >>> inputs["source_ids"].shape, inputs["target_ids"].shape, labels.shape
    (TensorShape([2, 3]), TensorShape([2, 3]), TensorShape([2, 3]))
    """
    if len(source_ids) != len(target_ids):
        raise ValueError(
            "`source_ids` and `target_ids` must have one sequence for each pair; received "
            f"{len(source_ids)} and {len(target_ids)}."
        )
    if not len(source_ids):
        raise ValueError("`source_ids` and `target_ids` must hold at least one pair; received none.")

    def padded_lengths(sequences):
        lengths = np.array([len(sequence) + 1 for sequence in sequences])
        return -(-lengths // length_multiple) * length_multiple

    sizes = np.stack([padded_lengths(source_ids), padded_lengths(target_ids)], axis=-1)
    longest = sizes.max(axis=-1)
    if longest.max() > tokens_per_batch:
        raise ValueError(
            f"`tokens_per_batch` must be at least {longest.max()}, the padded length of the longest pair (number "
            f"{longest.argmax()}); received {tokens_per_batch}."
        )
    # Equal keys may change places from epoch to epoch without moving a batch's boundary.
    keys = (sizes[:, 0], sizes[:, 1], longest)
    boundaries = _batch_boundaries(longest[np.lexsort(keys)], tokens_per_batch)
    randoms = numbered_generators(seed, first_epoch)

    def pad(rows):
        width = -(-max(map(len, rows)) // length_multiple) * length_multiple
        return pad_sequences(rows, width, padding="post", value=pad_id)

    def epoch():
        order = np.arange(len(longest))
        batch_order = np.arange(len(boundaries))
        random = next(randoms)
        if shuffle:
            random.shuffle(order)
            random.shuffle(batch_order)
        order = order[np.lexsort([key[order] for key in keys])]
        for begin, end in boundaries[batch_order]:
            chosen = order[begin:end]
            sources = [[*source_ids[i], end_id] for i in chosen]
            targets = [[start_id, *target_ids[i], end_id] for i in chosen]
            inputs = {"source_ids": pad(sources), "target_ids": pad([row[:-1] for row in targets])}
            yield inputs, pad([row[1:] for row in targets])

    ids = tf.TensorSpec((None, None), "int32")
    signature = ({"source_ids": ids, "target_ids": ids}, ids)
    return prefetched(tf.data.Dataset.from_generator(epoch, output_signature=signature), len(boundaries))


def _batch_boundaries(lengths, tokens_per_batch):
    """Cuts sorted lengths into runs of which `rows * longest` stays within the budget: [batches, 2]."""
    boundaries, begin = [], 0
    for end, length in enumerate(lengths):
        if (end - begin + 1) * length > tokens_per_batch:
            boundaries.append((begin, end))
            begin = end
    boundaries.append((begin, len(lengths)))
    return np.array(boundaries)


def text_batches(rows, labels, batch_size, shuffle=True, seed=0, buckets=8, pad_id=0, first_epoch=0):
    """Groups rows of token ids and their labels into padded batches of about equally long rows.

    Rows fall into buckets by their length, each of which holds about as many, and are padded to the longest that their
    bucket may hold. All batches of a bucket have one shape, so that a compiled step is traced at most once a bucket:
    the last one is filled up with rows of weight 0. Compile the model with `weighted_metrics`, which leave them out.

    Args:
        rows: List of integer sequences, none of them empty; or a dict of such lists, by the names of a model's inputs.
        labels: List of integers; or of integer sequences, the labels of tokens.
        batch_size: Integer. How many rows a batch has.
        shuffle: Boolean. Whether each epoch has an order of its own; otherwise all have the same.
        seed: Integer. The same seed gives the same epochs.
        buckets: Integer. The largest number of different lengths.
        pad_id: Integer. The id that fills up rows. Inputs that are called a mask are filled up with 0, labels of tokens
            with -100.
        first_epoch: Integer. The number of the epoch that the first pass gives, for a training that is resumed.

    Returns:
        A `tf.data.Dataset` of `(inputs, labels, weights)`: int32 `[batch, length]` or a dict of such, int32 `[batch]`
        or `[batch, length]`, and float32 `[batch]`. Its cardinality is the number of batches in an epoch.

    Raises:
        ValueError: If there are no rows, one of them is empty, or there are not as many labels.

    Example:

    >>> batches = text_batches([[5, 6, 7], [8], [9, 3]], [0, 1, 1], batch_size=2, shuffle=False, buckets=1)
    >>> for ids, labels, weights in batches:
    ...     print(ids.numpy().tolist(), labels.numpy(), weights.numpy())
    [[5, 6, 7, 0], [8, 0, 0, 0]] [0 1] [1. 1.]
    [[9, 3, 0, 0], [9, 3, 0, 0]] [1 1] [1. 0.]
    """
    parts = list(rows.values()) if isinstance(rows, dict) else [rows]
    numbers = {len(part) for part in [*parts, labels]}
    if numbers == {0} or len(numbers) != 1:
        raise ValueError(
            "`rows` and `labels` must be as many, at least one; received "
            f"{' and '.join(str(len(part)) for part in parts)} rows and {len(labels)} labels."
        )
    if np.ndim(labels[0]) == 1:
        parts.append(labels)
    part_lengths = np.array([[len(row) for row in part] for part in parts])
    if not part_lengths.min():
        raise ValueError(
            f"`rows` must not be empty; received number {part_lengths.min(axis=0).argmin()} without a token."
        )
    lengths = part_lengths.max(axis=0)
    quantiles = np.quantile(lengths, np.arange(1, buckets + 1) / buckets)
    longest = np.unique(-(-np.ceil(quantiles).astype(int) // 4) * 4)
    bucket_of = np.searchsorted(longest, lengths)
    size = int(np.sum(-(-np.bincount(bucket_of) // batch_size)))
    randoms = numbered_generators(seed, first_epoch)

    def pad(part, chosen, length, fill):
        return pad_sequences([part[i] for i in chosen], length, padding="post", value=fill)

    def batch(chosen, length):
        weights = np.arange(batch_size) < len(chosen)
        chosen = chosen + chosen[:1] * (batch_size - len(chosen))
        if isinstance(rows, dict):
            padding = {name: 0 if name.endswith("mask") else pad_id for name in rows}
            inputs = {name: pad(part, chosen, length, padding[name]) for name, part in rows.items()}
        else:
            inputs = pad(rows, chosen, length, pad_id)
        of_tokens = np.ndim(labels[0]) == 1
        targets = pad(labels, chosen, length, -100) if of_tokens else np.array([labels[i] for i in chosen], "int32")
        return inputs, targets, weights.astype("float32")

    def epoch():
        order, random = np.arange(len(lengths)), next(randoms)
        if shuffle:
            random.shuffle(order)
        waiting = [[] for _ in longest]
        for i in order:
            chosen = waiting[bucket_of[i]]
            chosen.append(i)
            if len(chosen) == batch_size:
                yield batch(chosen, longest[bucket_of[i]])
                chosen.clear()
        for chosen, length in zip(waiting, longest, strict=True):
            if chosen:
                yield batch(chosen, length)

    ids = tf.TensorSpec((batch_size, None), "int32")
    inputs = dict.fromkeys(rows, ids) if isinstance(rows, dict) else ids
    targets = ids if np.ndim(labels[0]) == 1 else tf.TensorSpec((batch_size,), "int32")
    weights = tf.TensorSpec((batch_size,), "float32")
    return prefetched(tf.data.Dataset.from_generator(epoch, output_signature=(inputs, targets, weights)), size)


def prefetched(batches, count=None, ahead=8):
    """Batches that are made while the model computes with the ones before, `untuned`.

    Args:
        batches: `tf.data.Dataset`.
        count: Integer. How many batches an epoch has, where the dataset does not know.
        ahead: Integer. How many of them may be waiting.

    Returns:
        `tf.data.Dataset` of the same batches.

    Example:

    >>> import tensorflow as tf
    >>> [int(batch) for batch in prefetched(tf.data.Dataset.range(3))]
    [0, 1, 2]
    """
    if count is not None:
        batches = batches.apply(tf.data.experimental.assert_cardinality(count))
    return untuned(batches.prefetch(ahead))


def untuned(dataset):
    """The dataset and all that is made of it, without TensorFlow's search for better settings while it is read.

    A thread does that in rounds that become longer and longer. Where it misses the sign to stop, which on busy cores is
    every second time, the end of an epoch waits for its next round: for as long again as the epoch took, up to a
    minute. Without it, what is to be done in parallel has as many threads as there are cores.

    Args:
        dataset: `tf.data.Dataset`.

    Returns:
        `tf.data.Dataset` of the same elements.

    Example:

    >>> import tensorflow as tf
    >>> untuned(tf.data.Dataset.range(3)).map(lambda x: x).options().autotune.enabled
    False
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def numbered_generators(seed, first):
    """NumPy's generators for this and all later numbers, of epochs say: each a function of the seed and its number."""
    return (np.random.default_rng((seed, number)) for number in itertools.count(first))


def epoch_rows(count, shuffle=True, seed=0, first_epoch=0):
    """The places of rows in an order of each epoch's own, and with each what to draw random numbers by.

    Both are a function of the seed, the epoch and the place in it, so that a training that is resumed finds what it
    would have found.

    Args:
        count: Integer. How many rows there are.
        shuffle: Boolean. Whether each epoch has an order of its own; otherwise it is that of the rows.
        seed: Integer. The same seed gives the same epochs.
        first_epoch: Integer. The number of the epoch that the first pass gives.

    Returns:
        A `tf.data.Dataset` of int32 scalars, and of int32 `[2]`, seeds for stateless functions of `tf.random`.

    Example:

    >>> rows = epoch_rows(4)
    >>> [[int(place) for place, _ in rows] for epoch in range(2)]
    [[2, 0, 1, 3], [3, 0, 2, 1]]
    """
    randoms = numbered_generators(seed, first_epoch)

    def epoch():
        random = next(randoms)
        order = random.permutation(count) if shuffle else np.arange(count)
        yield order, random.integers(2**31, size=(count, 2))

    signature = (tf.TensorSpec((count,), "int32"), tf.TensorSpec((count, 2), "int32"))
    rows = tf.data.Dataset.from_generator(epoch, output_signature=signature).unbatch()
    return untuned(rows.apply(tf.data.experimental.assert_cardinality(count)))
