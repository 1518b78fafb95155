"""Callbacks for `keras.Model.fit`."""

import os
import re

import keras
import numpy as np


class AverageWeights(keras.callbacks.Callback):
    """Averages the weights of the last epochs at the end of training.

    [Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 6.1, scores the mean of the last
    checkpoints instead of the last one. At each epoch's end this callback writes `epoch-0001.weights.h5`,
    `epoch-0002.weights.h5`, ... (numbered from 1, as `fit` prints them) into `directory` and deletes all but the
    last few; when training ends, their mean is put into the model.

    A snapshot is what `model.save_weights` writes, optimizer included. It is written under another name first and
    renamed when it is whole, so an interruption at any moment leaves whole snapshots only, and the newest of them is
    a place to resume from: `model.load_weights(path)`, then `model.fit(..., initial_epoch=epoch)`.

    As the snapshots live on disk, a training that was interrupted and started again with the same directory averages
    over the epochs of both runs. Snapshots of epochs that this `fit` is about to train (those after its initial epoch,
    all of them when it starts from the beginning) belong to another or an abandoned run and are deleted as its first
    epoch begins. Only then is the initial epoch settled, whichever callback or argument sets it, so the place in the
    list of callbacks does not matter for this.

    The order matters elsewhere:

    - Before `keras.callbacks.BackupAndRestore`: then an epoch's snapshot exists before the backup calls the epoch done.
      (The other way round, an interruption between the two loses that one snapshot from the average.)
    - After `keras.callbacks.EarlyStopping(restore_best_weights=True)`, which also replaces the weights when training
      ends: whichever comes last wins.

    When `fit` finds nothing left to train, because it was interrupted after its last epoch, the mean is put in all
    the same.

    Args:
        directory: String or path, where the snapshots are kept. It is created if it does not exist; other files in it
            are left alone.
        last: Positive integer, the number of epochs to average over.

    Raises:
        ValueError: If `last` is not a positive integer.

    Example:

    >>> import tempfile
    >>> import keras
    >>> import numpy as np
    >>> from keras_transformer.training import AverageWeights
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> average = AverageWeights(tempfile.mkdtemp(), last=2)
    >>> history = model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=3, verbose=0, callbacks=[average])
    >>> list(average.snapshots())
    [2, 3]
    """

    def __init__(self, directory, last=10):
        super().__init__()
        if isinstance(last, bool) or not isinstance(last, int) or last < 1:
            raise ValueError(f"`last` must be a positive integer, a number of epochs. Received: last={last!r}")
        self.directory = os.fspath(directory)
        self.last = last
        self._initial_epoch_known = False

    def snapshots(self):
        """The snapshots on disk: a dict from epoch, counted from 1, to path, oldest first."""
        if not os.path.isdir(self.directory):
            return {}
        found = {}
        for name in os.listdir(self.directory):
            match = re.fullmatch(r"epoch-(\d{4,})\.weights\.h5", name)
            if match:
                found[int(match.group(1))] = os.path.join(self.directory, name)
        return dict(sorted(found.items()))

    def average(self, model=None):
        """Puts the mean of the stored snapshots, the latest `last` of them, into the model.

        Weights of a float dtype are averaged, in float64. What else a snapshot holds (integer weights, the state of the
        optimizer) is taken from the latest.

        Args:
            model: `keras.Model` of the same architecture. Defaults to the model that `fit` trains.

        Returns:
            The list of the epochs averaged over, counted from 1.

        Raises:
            ValueError: If there is no model or no snapshot, or if a snapshot does not fit the model. The model then
                keeps the weights it had.
        """
        model = model or self.model
        if model is None:
            raise ValueError("`model` must be given when `average()` is called outside of `fit`. Received: model=None")
        snapshots = dict(list(self.snapshots().items())[-self.last :])
        if not snapshots:
            raise ValueError(
                f"`directory` must hold snapshots named epoch-0001.weights.h5, ...; none in {self.directory}"
            )
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and not optimizer.built:
            optimizer.build(model.trainable_variables)
        weights = [weight for weight in model.weights if keras.backend.is_float_dtype(weight.dtype)]
        before = [keras.ops.convert_to_numpy(weight) for weight in weights]
        sums = [np.zeros(weight.shape, "float64") for weight in weights]
        # Oldest first, so that everything that is not averaged ends as it was in the latest.
        for path in snapshots.values():
            try:
                model.load_weights(path)
            except Exception as error:
                for weight, value in zip(weights, before, strict=True):
                    weight.assign(value)
                raise ValueError(
                    f"`directory` holds a snapshot that does not fit the model: {path} ({error})"
                ) from error
            for total, weight in zip(sums, weights, strict=True):
                total += keras.ops.convert_to_numpy(weight).astype("float64")
        for total, weight in zip(sums, weights, strict=True):
            weight.assign(total / len(snapshots))
        return list(snapshots)

    def on_train_begin(self, logs=None):
        self._initial_epoch_known = False

    def on_epoch_begin(self, epoch, logs=None):
        if self._initial_epoch_known:
            return
        self._initial_epoch_known = True
        os.makedirs(self.directory, exist_ok=True)
        for number, path in self.snapshots().items():
            if number > epoch:
                os.remove(path)

    def on_epoch_end(self, epoch, logs=None):
        partial = os.path.join(self.directory, "partial.weights.h5")  # `save_weights` insists on this ending
        self.model.save_weights(partial, overwrite=True)
        os.replace(partial, os.path.join(self.directory, f"epoch-{epoch + 1:04d}.weights.h5"))
        for path in list(self.snapshots().values())[: -self.last]:
            os.remove(path)

    def on_train_end(self, logs=None):
        if self.snapshots():
            self.average()


class BleuScore(keras.callbacks.Callback):
    """Translates at an epoch's end and puts the corpus BLEU into the logs, as `val_bleu`.

    The score is [sacrebleu](https://aclanthology.org/W18-6319)'s. Callbacks that stand after this one in the list see
    it as they see the validation loss: `EarlyStopping(monitor="val_bleu", mode="max")`, `ModelCheckpoint`,
    `TensorBoard`; so do the progress bar and the returned `History`.

    The first and the last epoch of a `fit` are always scored, and every `every`-th between them. An epoch without a
    score of its own carries the last one on, so that the key is in every epoch's logs; a patience should therefore be
    no shorter than `every`.

    Args:
        translate: Callable, from a list of source strings to the list of their translations.
        sources: List of strings to translate.
        references: List of strings, the right translation of each source.
        every: Positive integer, score every so many epochs.
        tokenize: String, sacrebleu's name for the way to cut sentences into words: `"13a"` for plain text, `"none"`
            for text that is tokenized already, `"zh"`, `"ja-mecab"`, `"char"`, ...
        lowercase: Boolean, whether to ignore case.
        samples: Integer, the number of sources, evenly spread over the list, to print with translation and reference
            whenever the score is taken.

    Raises:
        ImportError: If sacrebleu is not installed.
        ValueError: If an argument is out of range, or `sources` and `references` differ in length.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_transformer.training import BleuScore
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> upper = lambda sources: [source.upper() for source in sources]
    >>> bleu = BleuScore(upper, ["it is a dog .", "so it is ."], ["IT IS A DOG .", "SO IT IS ."])
    >>> history = model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[bleu])
    >>> print([round(score) for score in history.history["val_bleu"]])
    [100]
    """

    def __init__(self, translate, sources, references, every=1, tokenize="13a", lowercase=False, samples=0):
        super().__init__()
        if not callable(translate):
            raise ValueError(f"`translate` must be callable, list of str -> list of str. Received: {translate!r}")
        self.sources = _check_strings("sources", sources)
        self.references = _check_strings("references", references)
        if len(self.sources) != len(self.references):
            raise ValueError(
                "`references` must hold one string for each of `sources`; "
                f"received {len(self.references)} references and {len(self.sources)} sources."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be a positive integer, a number of epochs. Received: every={every!r}")
        if isinstance(samples, bool) or not isinstance(samples, int) or not 0 <= samples <= len(self.sources):
            raise ValueError(
                f"`samples` must be an integer from 0 to the number of sources, {len(self.sources)}. "
                f"Received: samples={samples!r}"
            )
        try:
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            raise ImportError('BleuScore needs sacrebleu: pip install "keras-transformer-layers[examples]"') from error
        if tokenize not in BLEU.TOKENIZERS:
            raise ValueError(
                f"`tokenize` must be one of {', '.join(sorted(map(str, BLEU.TOKENIZERS)))}. Received: {tokenize!r}"
            )
        self.translate = translate
        self.every = every
        self.tokenize = tokenize
        self.lowercase = lowercase
        self.samples = samples
        self.score = None
        # `force` only silences the warning that the text looks tokenized, which "none" says it is.
        self._bleu = BLEU(tokenize=tokenize, lowercase=lowercase, force=tokenize == "none")

    def on_train_begin(self, logs=None):
        self.score = None

    def on_epoch_end(self, epoch, logs=None):
        is_last = epoch + 1 == self.params.get("epochs") or self.model.stop_training
        if self.score is None or is_last or (epoch + 1) % self.every == 0:
            translations = _check_strings("translate(sources)", self.translate(list(self.sources)))
            if len(translations) != len(self.sources):
                raise ValueError(
                    "`translate` must return one string for each source; "
                    f"received {len(translations)} for {len(self.sources)} sources."
                )
            self.score = self._bleu.corpus_score(translations, [self.references]).score
            if self.samples:
                self._print_samples(epoch, translations)
        if logs is not None:
            logs["val_bleu"] = self.score

    def _print_samples(self, epoch, translations):
        lines = ["", f"Epoch {epoch + 1}: BLEU {self.score:.2f}"]  # the empty line ends that of the progress bar
        for index in np.linspace(0, len(self.sources) - 1, self.samples).round().astype(int):
            lines.append(f"  source       {self.sources[index]}")
            lines.append(f"  translation  {translations[index]}")
            lines.append(f"  reference    {self.references[index]}")
            lines.append("")
        print("\n".join(lines), flush=True)


def _check_strings(name, values):
    if isinstance(values, (str, bytes)):
        raise ValueError(f"`{name}` must be a list of strings, not one string. Received: {values!r}")
    values = list(values)
    strange = next((value for value in values if not isinstance(value, str)), None)
    if not values or strange is not None:
        received = "an empty list" if not values else f"an item of type {type(strange).__name__}: {strange!r}"
        raise ValueError(f"`{name}` must be a list of strings, with at least one. Received: {received}")
    return values
