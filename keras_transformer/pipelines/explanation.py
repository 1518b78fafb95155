"""What a translator looked at for each token that it wrote, as a TensorFlow function for a SavedModel."""

import tensorflow as tf

from keras_transformer.generation.constraints import end_tokens
from keras_transformer.layers import CrossAttention
from keras_transformer.scopes import RecordingScope


def explained(pipeline):
    """The function of texts `[B]` that translates them, and runs the model over the result for its attention.

    Args:
        pipeline: `Pipeline` around an encoder-decoder.

    Returns:
        `tf.function` from `text` to a dict of `text`, `source_tokens`, `target_tokens` and `attention`, as the
        signature of `Pipeline.export` has them.
    """
    generator, graph = pipeline.generator, pipeline.generator.graph
    names = [tf.constant(_token_names(tokenizer)) for tokenizer in (pipeline.source, pipeline.target)]
    start, end, pad_id = generator.start_id, end_tokens(generator.end_id), generator.pad_id

    def explain(text):
        source = pipeline._encode_in_graph(text)["source_ids"]  # [B, S]
        ids = generator.generate_tensors({"source_ids": source}, pipeline.max_new_tokens)
        written = tf.reduce_any(ids[..., None] == tf.constant(end), axis=-1)
        # The end is written too: what is real lies before it, or is it.
        real = tf.cumsum(tf.cast(written, "int32"), axis=1, exclusive=True) == 0
        ids = ids[:, : tf.reduce_max(tf.concat([tf.reduce_sum(tf.cast(real, "int32"), axis=1), [0]], axis=0))]
        real = real[:, : tf.shape(ids)[1]]
        before = tf.concat([tf.fill([tf.shape(ids)[0], 1], start), ids[:, :-1]], axis=1)
        with RecordingScope(["weights"]) as scope:
            graph.decode(before, graph.encode({"source_ids": source}))
        weights = [value for path, value in scope.records.items() if isinstance(scope.origins[path][0], CrossAttention)]
        return {
            "text": pipeline._decode_in_graph(ids),
            "source_tokens": tf.where(source != pad_id, tf.gather(names[0], source), ""),
            "target_tokens": tf.where(real, tf.gather(names[1], ids), ""),
            "attention": tf.cast(tf.stack(weights, axis=1), "float32"),
        }

    text = tf.TensorSpec([None], "string", name="text")
    return tf.function(explain, input_signature=[text], autograph=False)


def _token_names(tokenizer):
    return [tokenizer.id_to_token(i) for i in range(tokenizer.vocabulary_size())]
