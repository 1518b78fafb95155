"""Recognition in two passes: the encoder proposes whole texts, the decoder says how likely each is."""

import collections

import keras
import numpy as np
from keras import ops

from keras_transformer.generation.batches import pad_rows, repeat_rows
from keras_transformer.generation.graph import DecodingGraph
from keras_transformer.ops.masks import SURELY_NOT, surely_blank


class AttentionRescoring:
    """Writes what encoder and decoder of a recognizer find likeliest together.

    A beam search over the encoder's own answer, by connectionist temporal classification (CTC), proposes texts. The
    decoder reads each of them at once, and the text with the largest weighted sum of both logarithms of its probability
    is the answer. CTC hears each token where it was said, but none of the others; the decoder knows what tokens follow
    each other, but may lose its place: each keeps the other from its own mistakes. As nothing is decoded token by
    token, it takes three passes through the model, whatever the length.

    It goes in the place of a `Generator` in a `Pipeline`.

    Args:
        model: `keras.Model` such as `speech_recognizer` gives, whose outputs are a dict of `logits` and `ctc_logits`.
        start_id: int. The token that the decoder begins with.
        end_id: int. The token that ends a text.
        pad_id: int. Padding, which is also the blank of CTC.
        width: int. How many texts the search keeps and proposes.
        ctc_weight: float between 0 and 1. The share of CTC in the sum.

    Raises:
        ValueError: if the model has no such outputs, or a number is out of range.

    References: [Unified Streaming and Non-streaming Two-pass End-to-end Model](https://arxiv.org/abs/2012.05481),
    section 2.1; [Hybrid CTC/Attention Architecture](https://ieeexplore.ieee.org/document/8068205), section III.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.speech_recognizer(9, 40, dim=16, depth=1, num_heads=2, hidden_dim=16)
    >>> recognizer = kt.generation.AttentionRescoring(model, start_id=1, end_id=2, width=4)
    >>> recognizer.generate({"features": np.ones((2, 64, 40), "float32")}, max_new_tokens=8).shape
    (2, 8)
    """

    def __init__(self, model, start_id, end_id, pad_id=0, width=16, ctc_weight=0.5):
        outputs = model.output if isinstance(model.output, dict) else {}
        if not {"logits", "ctc_logits"} <= set(outputs):
            raise ValueError(
                "`model` must have the outputs 'logits' and 'ctc_logits', as `speech_recognizer` has with `ctc=True`; "
                f"received one with {sorted(outputs) or 'a single output'}."
            )
        if width < 1 or not 0 <= ctc_weight <= 1:
            raise ValueError(
                f"`width` must be positive and `ctc_weight` between 0 and 1; received width={width}, "
                f"ctc_weight={ctc_weight}."
            )
        self.graph = DecodingGraph(model)
        self.model = model
        self.start_id = start_id
        self.end_id = end_id
        self.pad_id = pad_id
        self.width = width
        self.ctc_weight = ctc_weight

    def generate(self, inputs, max_new_tokens):
        """Recognizes a batch.

        Args:
            inputs: dict from the names of the encoder's inputs to arrays.
            max_new_tokens: int. How many tokens the answer has room for.

        Returns:
            int32 array of shape `[batch, max_new_tokens]`: the tokens and the end, and `pad_id` after it.

        Raises:
            ValueError: if an input is missing or unknown, or `max_new_tokens` is not positive.
        """
        self._check(inputs, max_new_tokens)
        tensors = {name: ops.convert_to_tensor(x) for name, x in inputs.items()}
        if not len(next(iter(inputs.values()))):
            return np.zeros((0, max_new_tokens), "int32")
        return ops.convert_to_numpy(self._answers(tensors, max_new_tokens))

    def generate_tensors(self, inputs, max_new_tokens):
        """The same inside a `tf.function`, for a SavedModel; sizes may be unknown until run time."""
        self._check(inputs, max_new_tokens)
        return self._answers(dict(inputs), max_new_tokens)

    def get_config(self):
        """What a recognizer is made of besides its model, as a dict that can be written as JSON."""
        names = ("start_id", "end_id", "pad_id", "width", "ctc_weight")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, model, config):
        """The recognizer that `get_config` described, for `model`."""
        return cls(model, **config)

    def _check(self, inputs, max_new_tokens):
        if set(inputs) != set(self.graph.source_inputs):
            raise ValueError(f"`inputs` must be {sorted(self.graph.source_inputs)}; received {sorted(inputs)}.")
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be positive; received {max_new_tokens}.")

    def _answers(self, sources, max_new_tokens):
        texts, log_probability = self._proposals(sources)  # [B, W, L], [B, W]
        batch, width, length = ops.shape(texts)
        scores = self.ctc_weight * log_probability + (1 - self.ctc_weight) * self._decoder_scores(sources, texts)
        scores = ops.where(log_probability == -float("inf"), log_probability, scores)  # And not 0 times as much.
        best = ops.argmax(scores, axis=-1)[:, None, None]
        text = ops.take_along_axis(texts, ops.broadcast_to(best, (batch, 1, length)), axis=1)[:, 0]  # [B, L]
        text = self._ended(text)
        text = ops.pad(text, ((0, 0), (0, max_new_tokens)), constant_values=self.pad_id)
        return text[:, :max_new_tokens]

    def _proposals(self, sources):
        """Texts `[B, W, L]`, filled up with padding, and the logarithm of what CTC gives each."""
        tokens = ops.full((ops.shape(next(iter(sources.values())))[0], 1), self.start_id, dtype="int32")
        named = {**sources, self.graph.token_input: tokens}  # What the decoder says to it is not read.
        logits = self.model(named, training=False)["ctc_logits"]
        return ctc_beam_search(ops.cast(logits, "float32"), self.width, self.pad_id)

    def _decoder_scores(self, sources, texts):
        """The logarithm of what the decoder gives each text with its end: `[B, W]`."""
        batch, width, length = ops.shape(texts)
        boundary = [repeat_rows(x, self.width) for x in self.graph.encode(sources)]
        rows = ops.reshape(texts, (-1, length))
        start = ops.full((ops.shape(rows)[0], 1), self.start_id, dtype="int32")
        logits = self.graph.decode(ops.concatenate([start, rows], axis=1), boundary)
        labels = self._ended(rows)  # [B * W, L + 1]
        of_labels = ops.take_along_axis(ops.log_softmax(ops.cast(logits, "float32")), labels[..., None], axis=-1)
        scores = ops.sum(ops.where(labels == self.pad_id, 0.0, of_labels[..., 0]), axis=-1)
        return ops.reshape(scores, (batch, width))

    def _ended(self, rows):
        """Rows `[N, L]` with the end behind their last token: `[N, L + 1]`."""
        count = ops.sum(ops.cast(rows != self.pad_id, "int32"), axis=-1, keepdims=True)
        rows = ops.pad(rows, ((0, 0), (0, 1)), constant_values=self.pad_id)
        return ops.where(ops.arange(ops.shape(rows)[1]) == count, self.end_id, rows)


def ctc_beam_search(logits, width, blank_id=0):
    """The likeliest texts by connectionist temporal classification, all alignments of a text taken together.

    Args:
        logits: float tensor of shape `[B, T, vocabulary]`. Frames that are sure to be blank are padding.
        width: int. How many texts are kept at each frame, and returned.
        blank_id: int. The blank, which is no token.

    Returns:
        A tuple of texts int32 `[B, width, L]`, the likeliest first, filled up behind with `blank_id`; and the
        logarithms of their probabilities, float32 `[B, width]`, -inf where there are not as many texts.

    Reference: [First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent
    DNNs](https://arxiv.org/abs/1408.2873), algorithm 1.

    Example:

    >>> import numpy as np
    >>> logits = np.log(np.array([[[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]]], "float32"))
    >>> texts, scores = ctc_beam_search(logits, 2)
    >>> keras.ops.convert_to_numpy(texts)[0, :, 0].tolist(), f"{float(scores[0][0]):.3f}"  # 0.4 * 0.4 + 2 * 0.5 * 0.4
    ([1, 0], '-0.580')
    """
    if keras.backend.backend() != "tensorflow":  # Keras' own has other results on torch, and takes minutes on JAX.
        found = [_prefixes(row, width, blank_id) for row in ops.convert_to_numpy(ops.log_softmax(logits, axis=-1))]
        pairs = [pair for row in found for pair in (row + [((), -np.inf)] * width)[:width]]
        texts = pad_rows([text for text, _ in pairs], blank_id)
        scores = np.array([score for _, score in pairs], "float32").reshape(len(found), width)
        return ops.convert_to_tensor(texts.reshape(len(found), width, texts.shape[1])), ops.convert_to_tensor(scores)
    # TensorFlow's kernel wants as many texts as it is asked for: frames that are nearly sure to be blank allow more.
    more = ops.ones((ops.shape(logits)[0], 8, 1)) * surely_blank(logits.shape[-1], blank_id)
    logits = ops.concatenate([logits, more], axis=1)
    lengths = ops.full((ops.shape(logits)[0],), ops.shape(logits)[1], dtype="int32")
    options = {"strategy": "beam_search", "beam_width": width, "top_paths": width, "mask_index": blank_id}
    texts, scores = ops.ctc_decode(logits, lengths, **options)
    texts = ops.transpose(ops.cast(ops.where(texts < 0, blank_id, texts), "int32"), (1, 0, 2))
    return texts, ops.where(scores > SURELY_NOT / 2, scores, -float("inf"))


def _prefixes(frames, width, blank_id):
    """Pairs of the likeliest texts and the logarithms of their probabilities, for frames `[T, vocabulary]`."""
    beams = {(): (0.0, -np.inf)}  # The probability of all alignments that end with a blank, and with the last token.
    for frame in frames.astype("float64"):
        following = collections.defaultdict(lambda: [-np.inf, -np.inf])
        possible = [i for i in np.flatnonzero(frame > SURELY_NOT / 2).tolist() if i != blank_id]
        for text, (blank, token) in beams.items():
            either = np.logaddexp(blank, token)
            same = following[text]
            same[0] = np.logaddexp(same[0], either + frame[blank_id])
            for i in possible:
                longer = following[(*text, i)]
                if text and text[-1] == i:  # Without a blank between them, twice the token is once.
                    same[1] = np.logaddexp(same[1], token + frame[i])
                    longer[1] = np.logaddexp(longer[1], blank + frame[i])
                else:
                    longer[1] = np.logaddexp(longer[1], either + frame[i])
        best = sorted(following, key=lambda text: np.logaddexp(*following[text]), reverse=True)[:width]
        beams = {text: following[text] for text in best}
    scores = {text: float(np.logaddexp(*both)) for text, both in beams.items()}
    return [(text, score) for text, score in scores.items() if score > SURELY_NOT / 2]
