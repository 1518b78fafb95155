"""Batches of packed rows: several short texts in each, so that hardly anything is padding."""

import itertools

import numpy as np
import tensorflow as tf

from keras_transformer.pipelines.batching import numbered_generators, prefetched


def packed_batches(
    source_ids,
    target_ids,
    length,
    batch_size,
    shuffle=True,
    seed=0,
    first_epoch=0,
    start_id=1,
    end_id=2,
    pad_id=0,
):
    """Packs token ids of texts, or of translation pairs, into batches for a model of `models.packed`.

    The batches are for teacher forcing, as those of `token_batches`: a source ends with `end_id`, the decoder reads
    `start_id` and the target, and is to say the target and `end_id`. All batches have one shape, for which a step is
    compiled once; the last one is filled up with rows of padding. Every pass over the dataset is one epoch: each text
    comes exactly once, texts of one length change places, and the rows come in a new order.

    Args:
        source_ids: List of integer sequences, one for each source sentence, without start or end; or None for a
            language model, which reads the targets as `token_ids`.
        target_ids: List of integer sequences, one for each target sentence, without start or end.
        length: Integer. The tokens of a row, on either side.
        batch_size: Integer. The rows of a batch.
        shuffle: Boolean. Whether each epoch has an order of its own; otherwise all have the same.
        seed: Integer. The same seed gives the same epochs.
        first_epoch: Integer. The number of the epoch that the first pass gives, for a training that is resumed.
        start_id: Integer. The id that begins a target.
        end_id: Integer. The id that ends a sentence.
        pad_id: Integer. The id that fills a row.

    Returns:
        A `tf.data.Dataset` of `(inputs, labels)`, where inputs are `source_ids`, `source_segments`, `target_ids` and
        `target_segments`, or `token_ids` and `token_segments`; all int32 `[batch_size, length]`. Segments count the
        texts of a row from 1, and are 0 for padding.

    Raises:
        ValueError: If the two sides differ in number, are empty, or a text is longer than a row.

    Example:

    >>> inputs, labels = next(iter(packed_batches(None, [[5, 6], [7], [8, 9]], 5, 2, shuffle=False)))
    >>> inputs["token_ids"].numpy().tolist(), labels.numpy().tolist()
    ([[1, 5, 6, 1, 7], [1, 8, 9, 0, 0]], [[5, 6, 2, 7, 2], [8, 9, 2, 0, 0]])
    >>> inputs["token_segments"].numpy().tolist()
    [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]
    """
    sides = [target_ids] if source_ids is None else [source_ids, target_ids]
    if len(sides[0]) != len(target_ids) or not len(target_ids):
        raise ValueError(
            "`source_ids` and `target_ids` must have one sequence for each pair, and at least one; received "
            f"{len(sides[0])} and {len(target_ids)}."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive number of rows; received batch_size={batch_size}.")
    sizes = np.array([[len(text) + 1 for text in side] for side in sides]).T  # [texts, sides]
    if sizes.max() > length:
        raise ValueError(
            f"`length` must be at least {sizes.max()}, the length of the longest text (number "
            f"{sizes.max(axis=1).argmax()}) with its start or end; received length={length}."
        )
    rows = pack(sizes, length, np.random.default_rng(seed).permutation(len(sizes)) if shuffle else None)
    randoms = numbered_generators(seed, first_epoch)

    def joined(texts):
        """The texts of each row one behind the other, and which of them each token belongs to: `[2, rows, length]`."""
        batch = np.zeros((2, batch_size, length), "int32")
        batch[0] = pad_id
        for i, row in enumerate(texts):
            tokens = list(itertools.chain.from_iterable(row))
            batch[0, i, : len(tokens)] = tokens
            batch[1, i, : len(tokens)] = np.repeat(np.arange(1, len(row) + 1), [len(text) for text in row])
        return batch

    def epoch():
        random = next(randoms)
        places, order = np.arange(len(sizes)), np.arange(len(rows))
        if shuffle:
            places = exchanged(sizes, random)
            random.shuffle(order)
        for i in range(0, len(rows), batch_size):
            chosen = [places[rows[row]] for row in order[i : i + batch_size]]
            tokens, segments = joined([[[start_id, *target_ids[k]] for k in row] for row in chosen])
            labels, _ = joined([[[*target_ids[k], end_id] for k in row] for row in chosen])
            if source_ids is None:
                yield {"token_ids": tokens, "token_segments": segments}, labels
                continue
            inputs = {"target_ids": tokens, "target_segments": segments}
            tokens, segments = joined([[[*source_ids[k], end_id] for k in row] for row in chosen])
            yield {"source_ids": tokens, "source_segments": segments, **inputs}, labels

    names = ("token",) if source_ids is None else ("source", "target")
    ids = tf.TensorSpec((batch_size, length), "int32")
    signature = {f"{name}_{kind}": ids for name in names for kind in ("ids", "segments")}, ids
    return prefetched(tf.data.Dataset.from_generator(epoch, output_signature=signature), -(-len(rows) // batch_size))


def pack(sizes, capacity, order=None, open_rows=64):
    """Puts texts into rows: each into the first row that has room for it.

    Args:
        sizes: int array `[texts, sides]`. The tokens that a text takes on each side of a row.
        capacity: int. The tokens that a row has on each side.
        order: int array `[texts]`, or None. The order in which texts are put in.
        open_rows: int. How many rows are looked at; the fullest one is closed when there is room in none.

    Returns:
        List of int arrays, the numbers of the texts in each row.

    Reference: [First fit](https://en.wikipedia.org/wiki/First-fit_bin_packing), which needs at most 1.7 times as many
    rows as there must be; with texts much shorter than rows hardly more.

    Example:

    >>> [row.tolist() for row in pack(np.array([[3], [4], [2], [1]]), 5)]
    [[0, 2], [1, 3]]
    """
    rows, at = [], np.full(open_rows, -1)
    room = np.zeros((open_rows, sizes.shape[1]), sizes.dtype)
    for text in range(len(sizes)) if order is None else order:
        fits = np.flatnonzero((room >= sizes[text]).all(axis=1) & (at >= 0))
        if len(fits):
            slot = fits[at[fits].argmin()]
        else:
            slot = room.min(axis=1).argmin()
            at[slot], room[slot] = len(rows), capacity
            rows.append([])
        rows[at[slot]].append(text)
        room[slot] -= sizes[text]
    return [np.array(row) for row in rows]


def exchanged(sizes, random):
    """A permutation `[texts]` by which texts of the same sizes change places."""
    order = random.permutation(len(sizes))
    places = np.empty(len(sizes), int)
    places[np.lexsort(sizes.T)] = order[np.lexsort(sizes[order].T)]
    return places
