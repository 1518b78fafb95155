"""From sounds of any length to the frames that `speech_recognizer` reads: padding becomes frames of zeros."""

import keras
import numpy as np
import tensorflow as tf

from keras_transformer.pipelines.sounds import read_sound


class FrameReader:
    """Base of what turns sounds into frames, by one TensorFlow function in training, use and a SavedModel.

    Frames are padded to a multiple of 32 frames, so that little is compiled for other lengths.
    """

    MULTIPLE = 32

    def __init__(self):
        self._frames = tf.function(self.frames, input_signature=[self.signature[0]], autograph=False)

    def __call__(self, sounds):
        return {"features": self._padded_frames(self.waves(sounds))}

    def rows(self, sounds):
        """The frames of each sound, as a list of arrays `[frames, features]` without padding."""
        rows = []
        for wave in self.waves(sounds):
            frames = self._padded_frames([wave])[0]
            real = np.flatnonzero(frames.any(axis=-1))
            rows.append(frames[: real[-1] + 1 if len(real) else 1])
        return rows

    def in_graph(self, model, pad_id=0):
        """What reads tensors of sounds, filled up with zeros, in a TensorFlow graph."""
        return _GraphFrames(self)

    def padded(self, sounds):
        """Sounds `[B, N, ...]` filled up with zeros to a multiple of 32 frames."""
        multiple = self.MULTIPLE * self.samples_in_frame
        missing = -tf.shape(sounds)[1] % multiple
        return tf.pad(sounds, [(0, 0), (0, missing), *[(0, 0)] * (len(sounds.shape) - 2)])

    def _padded_frames(self, waves):
        batch = np.zeros((len(waves), max(map(len, waves), default=1), *self.signature[0].shape[2:]), "float32")
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = wave
        return self._frames(batch).numpy()


@keras.saving.register_keras_serializable(package="keras_transformer")
class WaveReader(FrameReader):
    """Reads sounds as log-mel spectra.

    A sound is the path of a file that libsndfile reads (WAV, FLAC, Ogg, MP3), which is resampled, or an array of floats
    sampled at `sampling_rate`. Each is brought to one loudness: its largest sample becomes 1. The power `p` of a mel
    band becomes `log(1 + 1e6 p) / 4`, which is 0 in digital silence, so that frames behind the end of a sound are zero
    and the model knows them for padding.

    Args:
        sampling_rate: int. Samples in a second.
        num_mels: int. Number of bands.
        window: float. Seconds that a spectrum is made of.
        hop: float. Seconds from one spectrum to the next.

    Call arguments:
        sounds: list of paths or arrays `[samples]`.

    Returns:
        Dict of `features`, an array float32 `[sounds, frames, num_mels]`.

    Raises:
        ValueError: if a sound cannot be read.

    Example:

    >>> import numpy as np
    >>> read = kt.pipelines.WaveReader(8000, num_mels=40)
    >>> features = read([np.random.uniform(-1, 1, 2000), np.random.uniform(-1, 1, 4000)])["features"]
    >>> features.shape, [int(row.any(axis=-1).sum()) for row in features]
    ((2, 64, 40), [25, 50])
    """

    signature = [tf.TensorSpec([None, None], "float32", name="sounds")]

    def __init__(self, sampling_rate=16000, num_mels=80, window=0.025, hop=0.01):
        self.sampling_rate = sampling_rate
        self.num_mels = num_mels
        self.window = window
        self.hop = hop
        self.samples_in_frame = round(hop * sampling_rate)
        super().__init__()

    def waves(self, sounds):
        return [read_sound(sound, self.sampling_rate) for sound in sounds]

    def frames(self, sounds):
        sounds = self.padded(sounds)
        sounds = tf.math.divide_no_nan(sounds, tf.reduce_max(tf.abs(sounds), axis=-1, keepdims=True))
        length = round(self.window * self.sampling_rate)
        # Each hop begins a frame, the last ones reach behind the end: then no length of padding moves them.
        spectra = tf.signal.stft(sounds, length, self.samples_in_frame, pad_end=True)  # [B, T, bins]
        power = tf.abs(spectra / (length / 2)) ** 2
        bands = tf.signal.linear_to_mel_weight_matrix(
            self.num_mels, spectra.shape[-1], self.sampling_rate, 20.0, self.sampling_rate / 2
        )
        return tf.math.log1p(1e6 * power @ bands) / 4

    def get_config(self):
        return {
            "sampling_rate": self.sampling_rate,
            "num_mels": self.num_mels,
            "window": self.window,
            "hop": self.hop,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_transformer")
class CepstrumReader(FrameReader):
    """Reads frames of MFCC, or of other features, which it normalizes, with their slopes in time beside them.

    Each feature gets mean 0 and variance 1 over the frames of its sound, which takes the microphone and the loudness
    away. Slopes are those of a line through five frames, and the slopes of these slopes.

    Args:
        num_features: int. Number of features of a frame.
        slopes: int. 2 for slopes and their slopes, 1 for slopes alone, 0 for none.

    Call arguments:
        sounds: list of arrays `[frames, num_features]`. A frame of zeros is padding.

    Returns:
        Dict of `features`, an array float32 `[sounds, frames, (1 + slopes) * num_features]`.

    Raises:
        ValueError: if a sound is no such array.

    Reference: [HTK Book](https://ai.stanford.edu/~amaas/data/htkbook.pdf), section 5.9, for the slopes.

    Example:

    >>> import numpy as np
    >>> read = kt.pipelines.CepstrumReader(13)
    >>> read([np.random.normal(size=(70, 13)), np.random.normal(size=(40, 13))])["features"].shape
    (2, 96, 39)
    """

    samples_in_frame = 1

    def __init__(self, num_features=13, slopes=2):
        self.num_features = num_features
        self.slopes = slopes
        self.signature = [tf.TensorSpec([None, None, num_features], "float32", name="features")]
        super().__init__()

    def waves(self, sounds):
        waves = [np.asarray(sound, "float32") for sound in sounds]
        for wave in waves:
            if wave.ndim != 2 or wave.shape[1] != self.num_features or not len(wave) or not np.isfinite(wave).all():
                raise ValueError(
                    f"A sound must be an array [frames, {self.num_features}] of finite numbers; received one of shape "
                    f"{wave.shape}."
                )
        return waves

    def frames(self, features):
        features = self.padded(features)
        real = tf.cast(tf.reduce_any(features != 0, axis=-1, keepdims=True), "float32")  # [B, T, 1]
        count = tf.maximum(tf.reduce_sum(real, axis=1, keepdims=True), 1)
        centred = (features - tf.reduce_sum(features * real, axis=1, keepdims=True) / count) * real
        variance = tf.reduce_sum(centred**2, axis=1, keepdims=True) / count
        parts = [centred * tf.math.rsqrt(variance + 1e-5)]
        for _ in range(self.slopes):
            parts.append(_slopes(parts[-1]) * real)
        return tf.concat(parts, axis=-1)

    def get_config(self):
        return {"num_features": self.num_features, "slopes": self.slopes}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def _slopes(x):
    """The slope of a line through each frame and two on either side, `[B, T, features]`."""
    length = tf.shape(x)[1]
    around = tf.pad(x, ((0, 0), (2, 2), (0, 0)))
    shifted = [around[:, i : i + length] for i in range(5)]
    return (2 * (shifted[4] - shifted[0]) + shifted[3] - shifted[1]) / 10


class _GraphFrames(tf.Module):
    """A reader of frames inside of a TensorFlow graph."""

    def __init__(self, reader):
        super().__init__()
        self.signature = reader.signature
        self._frames = lambda sounds: reader.frames(sounds)

    def __call__(self, sounds):
        return {"features": self._frames(sounds)}
