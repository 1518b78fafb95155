"""Batches of about equally long sounds and their transcripts."""

import numpy as np
import tensorflow as tf

from keras_transformer.generation.batches import pad_rows
from keras_transformer.pipelines.batching import _batch_boundaries, numbered_generators, prefetched


def speech_batches(frames, token_ids, frames_per_batch, shuffle=True, seed=0, start_id=1, end_id=2, first_epoch=0):
    """Groups sounds and the ids of their transcripts into padded batches of about equal cost.

    Sounds of similar length share a batch, which holds as many as fit `frames_per_batch`. The decoder reads `start_id`
    and the transcript, and is to say the transcript and `end_id`; CTC is to spell the transcript. Frames are padded to
    a multiple of 32, ids to one of 4. Every pass is one epoch: each sound comes once, in a new order.

    Args:
        frames: List of arrays float32 `[frames, features]`, the sounds.
        token_ids: List of integer sequences, their transcripts without start and end.
        frames_per_batch: Integer. The largest number of frames in a batch, padding included.
        shuffle: Boolean. Whether to change the order in each epoch; otherwise it goes from short to long.
        seed: Integer. The same seed gives the same epochs.
        start_id: Integer. The id that begins a transcript.
        end_id: Integer. The id that ends one.
        first_epoch: Integer. The number of the epoch that the first pass gives, for a training that is resumed.

    Returns:
        A `tf.data.Dataset` of `({"features", "target_ids"}, {"logits", "ctc_logits"})`: the inputs and the labels of
        `speech_recognizer`. Its cardinality is the number of batches in an epoch.

    Raises:
        ValueError: If the two lists differ in length or are empty, or a sound alone has more frames than a batch.

    Example:

    >>> import numpy as np
    >>> batches = speech_batches([np.ones((40, 8)), np.ones((20, 8))], [[5, 6], [7]], frames_per_batch=200)
    >>> inputs, labels = next(iter(batches))
    >>> {name: tuple(x.shape) for name, x in {**inputs, **labels}.items()}
    {'features': (2, 64, 8), 'target_ids': (2, 4), 'logits': (2, 4), 'ctc_logits': (2, 4)}
    """
    if len(frames) != len(token_ids) or not len(frames):
        raise ValueError(
            "`frames` and `token_ids` must have one entry for each sound, at least one; received "
            f"{len(frames)} and {len(token_ids)}."
        )
    lengths = -(-np.array([len(x) for x in frames]) // 32) * 32
    if lengths.max() > frames_per_batch:
        raise ValueError(
            f"`frames_per_batch` must be at least {lengths.max()}, the padded length of the longest sound (number "
            f"{lengths.argmax()}); received {frames_per_batch}."
        )
    boundaries = _batch_boundaries(np.sort(lengths), frames_per_batch)
    randoms, width = numbered_generators(seed, first_epoch), frames[0].shape[1]

    def pad(rows):
        ids = pad_rows(rows, 0)
        return np.pad(ids, ((0, 0), (0, -ids.shape[1] % 4)))

    def epoch():
        order, batch_order = np.arange(len(frames)), np.arange(len(boundaries))
        random = next(randoms)
        if shuffle:
            random.shuffle(order)
            random.shuffle(batch_order)
        order = order[np.argsort(lengths[order], kind="stable")]
        for begin, end in boundaries[batch_order]:
            chosen = order[begin:end]
            features = np.zeros((len(chosen), lengths[chosen].max(), width), "float32")
            for row, i in zip(features, chosen, strict=True):
                row[: len(frames[i])] = frames[i]
            texts = [list(token_ids[i]) for i in chosen]
            inputs = {"features": features, "target_ids": pad([[start_id, *text] for text in texts])}
            yield inputs, {"logits": pad([[*text, end_id] for text in texts]), "ctc_logits": pad(texts)}

    ids = tf.TensorSpec((None, None), "int32")
    inputs = {"features": tf.TensorSpec((None, None, width), "float32"), "target_ids": ids}
    signature = (inputs, {"logits": ids, "ctc_logits": ids})
    return prefetched(tf.data.Dataset.from_generator(epoch, output_signature=signature), len(boundaries))
