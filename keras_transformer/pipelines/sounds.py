"""Sound as a model reads it: log-mel spectra, made as the `preprocessor_config.json` of a checkpoint says."""

import os

import numpy as np

from keras_transformer.pipelines.images import read_preprocessor
from keras_transformer.pretrained.fields import Fields


class SoundPreprocessor:
    """Turns sounds into the log-mel spectra that Whisper reads.

    A sound is the path of a file that libsndfile reads (WAV, FLAC, Ogg, MP3), or an array of floats between -1 and 1,
    sampled at `sampling_rate`. Files are resampled to it, and their channels averaged. What is shorter than
    `seconds` is filled up with silence; what is longer is an error, and not cut.

    Args:
        num_mels: int. Number of bands.
        sampling_rate: int. Samples in a second.
        hop_length: int. Samples from one spectrum to the next.
        fft_length: int. Samples that a spectrum is made of.
        seconds: int. Length of the window that the model reads.

    Reference: [Robust Speech Recognition via Large-Scale Weak Supervision](https://arxiv.org/abs/2212.04356),
    section 2.2.

    Example:

    >>> import numpy as np
    >>> preprocessor = SoundPreprocessor(seconds=2)
    >>> preprocessor([np.zeros(16000, "float32")]).shape
    (1, 200, 80)
    """

    def __init__(self, num_mels=80, sampling_rate=16000, hop_length=160, fft_length=400, seconds=30):
        import keras_nlp

        self.sampling_rate = sampling_rate
        self.length = sampling_rate * seconds
        self.converter = keras_nlp.layers.WhisperAudioConverter(
            num_mels, fft_length, hop_length, sampling_rate, seconds, dtype="float32"
        )

    def __call__(self, sounds):
        """A batch float32 `[sounds, frames, mels]`."""
        waves = [self._checked(read_sound(sound, self.sampling_rate), sound) for sound in sounds]
        return np.stack([np.asarray(self.converter(wave), "float32") for wave in waves])

    @classmethod
    def from_directory(cls, directory):
        """The preprocessor of a checkpoint directory.

        Raises:
            FileNotFoundError: if there is neither `preprocessor_config.json` nor `processor_config.json`.
            ValueError: if a field has a value that is not supported here.
        """
        fields = Fields(read_preprocessor(directory, "feature_extractor"), "sound")
        fields.one_of("feature_extractor_type", ("WhisperFeatureExtractor",))
        fields.only("padding_value", 0.0)
        fields.only("dither", 0.0)
        fields.only("do_normalize", False)
        # These follow from the others, or are asked for when features are made.
        fields.ignore("mel_filters n_samples nb_max_frames processor_class padding_side return_attention_mask")
        preprocessor = cls(
            fields.take("feature_size", default=80),
            fields.take("sampling_rate", default=16000),
            fields.take("hop_length", default=160),
            fields.take("n_fft", default=400),
            fields.take("chunk_length", default=30),
        )
        fields.warn_of_unknown(f"The preprocessor of {directory}", "the features")
        return preprocessor

    def _checked(self, wave, sound):
        if len(wave) > self.length:
            raise ValueError(
                f"A sound must be at most {self.length / self.sampling_rate:g} seconds long, as what the model was "
                f"trained on; received {_called(sound)} of {len(wave) / self.sampling_rate:.1f} seconds. Cut it where "
                "nobody speaks."
            )
        return wave


def read_sound(sound, sampling_rate):
    """A sound as an array.

    Args:
        sound: path, or array of floats `[samples]` that is sampled at `sampling_rate` already.
        sampling_rate: int. Samples in a second of the result.

    Returns:
        Array float32 `[samples]`.

    Raises:
        ValueError: if it is neither, or the file cannot be read.

    Example:

    >>> read_sound([0.0, 0.5, -0.5], 16000)
    array([ 0. ,  0.5, -0.5], dtype=float32)
    """
    if isinstance(sound, str | os.PathLike):
        return read_sound_file(sound, sampling_rate)[0]
    wave = np.asarray(sound)
    if wave.dtype.kind != "f" or wave.ndim != 1 or not wave.size or not np.isfinite(wave).all():
        raise ValueError(
            "A sound must be a path, or a non-empty array of finite floats [samples] with one channel, between -1 and "
            f"1; received {type(sound).__name__} with dtype {wave.dtype} and shape {wave.shape}."
        )
    return wave.astype("float32")


def read_sound_file(file, sampling_rate=None, name=None):
    """A file of sound as an array, its channels averaged.

    Args:
        file: path, or file object in binary mode.
        sampling_rate: int. Samples in a second of the result; None for those of the file.
        name: str. What to call the file in errors; the path by default.

    Returns:
        A tuple of an array float32 `[samples]` and its sampling rate.

    Raises:
        ValueError: if the file cannot be read, or holds no sound.
    """
    import soundfile
    import soxr

    name = file if name is None else name
    try:
        wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} must be a sound file that libsndfile can read; {error}") from error
    if not len(wave):
        raise ValueError(f"{name} must hold sound; it has no samples.")
    wave = wave.mean(axis=-1)
    if sampling_rate in (None, rate):
        return wave, rate
    return soxr.resample(wave, rate, sampling_rate), sampling_rate


def _called(sound):
    return f"{sound}" if isinstance(sound, str | os.PathLike) else "an array"
