"""What the encoder of a recognizer says by itself."""

import numpy as np
from keras import ops


def ctc_texts(model, source, target, sounds, batch_size=32):
    """Texts as CTC alone writes them: the best token of each frame, repetitions and blanks left out.

    Args:
        model: `keras.Model` such as `speech_recognizer` gives, with `ctc_logits` among its outputs.
        source: reader of sounds, such as `WaveReader`.
        target: keras-nlp tokenizer of texts.
        sounds: list of what the reader takes.
        batch_size: int. How many sounds to process at once.

    Returns:
        List of str.

    Example:

    >>> import numpy as np
    >>> tokenizer = kt.pipelines.train_subwords(["yes", "no"])
    >>> model = kt.models.speech_recognizer(6, 40, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> len(ctc_texts(model, kt.pipelines.WaveReader(8000, num_mels=40), tokenizer, [np.ones(900)]))
    1
    """
    texts = []
    for begin in range(0, len(sounds), batch_size):
        inputs = source(sounds[begin : begin + batch_size])
        inputs["target_ids"] = np.ones((len(inputs["features"]), 1), "int32")  # What the decoder says is not read.
        outputs = model({name: ops.convert_to_tensor(x) for name, x in inputs.items()}, training=False)
        for best in ops.convert_to_numpy(ops.argmax(outputs["ctc_logits"], axis=-1)):
            changes = np.flatnonzero(np.diff(best, prepend=-1))
            ids = [int(i) for i in best[changes] if i]
            texts.append(_as_text(target.detokenize([ids])[0]) if ids else "")
    return texts


def _as_text(text):
    text = text.numpy() if hasattr(text, "numpy") else text
    return text.decode("utf-8") if isinstance(text, bytes) else text
