"""Batches of about equally long pairs, measured in tokens."""

import itertools

import numpy as np
import tensorflow as tf


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
    epochs = itertools.count(first_epoch)

    def pad(rows):
        width = -(-max(map(len, rows)) // length_multiple) * length_multiple
        batch = np.full((len(rows), width), pad_id, "int32")
        for row, values in zip(batch, rows, strict=True):
            row[: len(values)] = values
        return batch

    def epoch():
        order = np.arange(len(longest))
        batch_order = np.arange(len(boundaries))
        number = next(epochs)
        if shuffle:
            random = np.random.default_rng((seed, number))
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
    dataset = tf.data.Dataset.from_generator(epoch, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(boundaries))).prefetch(8)


def _batch_boundaries(lengths, tokens_per_batch):
    """Cuts sorted lengths into runs of which `rows * longest` stays within the budget: [batches, 2]."""
    boundaries, begin = [], 0
    for end, length in enumerate(lengths):
        if (end - begin + 1) * length > tokens_per_batch:
            boundaries.append((begin, end))
            begin = end
    boundaries.append((begin, len(lengths)))
    return np.array(boundaries)
