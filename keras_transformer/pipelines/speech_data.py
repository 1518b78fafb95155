"""Recorded speech and what was said: read from archives and folders, and spoken faster or slower, split."""

import io
import re
import tarfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_transformer.pipelines.labelled_texts import split_by_group
from keras_transformer.pipelines.sounds import read_sound_file

DIGITS = "zero one two three four five six seven eight nine".split()
DIGIT_FILE = re.compile(r"(\d)_([^_/]+)_(\d+)\.wav")
TRANSCRIPT = re.compile(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)\s*")
FORMATS = """\
a folder, or a .tar of one, that holds
- transcripts.tsv, whose lines have the name of a sound file (WAV, FLAC, Ogg, MP3), a tab and what is said in it; or
- {digit}_{speaker}_{number}.wav, as the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset); or
- etc/*.transcription and feat/**/*.mfc, as CMU's AN4 (www.speech.cs.cmu.edu/databases/an4) with its features"""


class Recording(NamedTuple):
    """A recording and what is said in it.

    Attributes:
        name: str. The file's path inside the folder or archive.
        sound: array float32, `[samples]` or, of features, `[frames, features]`.
        text: str. What is said.
        speaker: str. Who speaks: what the format says, or the file's folder.

    Example:

    >>> recording = Recording("ann/7.wav", np.zeros(800, "float32"), "seven", "ann")
    >>> recording.speaker, recording.sound.shape
    ('ann', (800,))
    """

    name: str
    sound: np.ndarray
    text: str
    speaker: str


def read_recordings(path, sampling_rate=None):
    """Reads recordings with their transcripts.

    The path is that of a folder, or of a `.tar` of one, in one of three formats: `transcripts.tsv` beside sound files;
    spoken digits called `{digit}_{speaker}_{number}.wav`; or CMU Sphinx's, transcripts beside MFCC features, 13 of
    them for each frame. Sound is brought to one sampling rate. What cannot be read is left out, and a warning names
    it and counts.

    Args:
        path: str or path.
        sampling_rate: int. Samples in a second; that of the first file by default.

    Returns:
        A tuple of a list of `Recording`, ordered by name, and the sampling rate, which for features is None.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the format is none of these, a transcript is broken, or nothing can be read.

    Example:

    >>> import pathlib, tempfile, numpy as np, soundfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> soundfile.write(folder / "7_ann_0.wav", np.zeros(800), 8000)
    >>> (recording,), sampling_rate = read_recordings(folder)
    >>> recording.text, recording.speaker, len(recording.sound), sampling_rate
    ('seven', 'ann', 800, 8000)
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {path}. Recordings are {FORMATS}.")
    files = _files(path)
    transcripts = [name for name in files if name.endswith(".transcription")]
    tables = [name for name in files if name.rsplit("/", 1)[-1] == "transcripts.tsv"]
    if transcripts:
        rows, read = _sphinx_rows(files, transcripts), _read_features
    elif tables:
        rows, read = _table_rows(files, tables), read_sound_file
    else:
        found = {name: DIGIT_FILE.fullmatch(name.rsplit("/", 1)[-1]) for name in files}
        rows = [(name, DIGITS[int(match[1])], match[2]) for name, match in found.items() if match]
        read = read_sound_file
    if not rows:
        raise ValueError(f"{path} holds no recordings that can be told. Recordings are {FORMATS}.")
    recordings, failures = [], []
    for name, text, speaker in sorted(rows):
        try:
            if name not in files:
                raise ValueError(f"{name} is missing")
            sound, sampling_rate = read(io.BytesIO(files[name]()), sampling_rate, name)
            recordings.append(Recording(name, sound, text, speaker))
        except (ValueError, OSError) as error:
            failures.append(str(error))
    if not recordings:
        raise ValueError(f"None of the {len(rows)} recordings of {path} can be read. The first: {failures[0]}")
    if failures:
        more = "" if len(failures) <= 20 else f"; and {len(failures) - 20} more"
        warnings.warn(
            f"{len(failures)} of {len(rows)} recordings cannot be read and are left out: "
            f"{'; '.join(failures[:20])}{more}.",
            stacklevel=2,
        )
    return recordings, sampling_rate


def _files(path):
    """A dict from the name of each file to what reads its bytes."""
    if path.is_dir():
        return {x.relative_to(path).as_posix(): x.read_bytes for x in sorted(path.rglob("*")) if x.is_file()}
    try:
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile()]
            contents = {member.name.removeprefix("./"): archive.extractfile(member).read() for member in members}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is not a whole tar file: {error}. Recordings are {FORMATS}.") from error
    return {name: (lambda data=data: data) for name, data in contents.items()}


def _lines(files, name):
    try:
        text = files[name]().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8; {error}.") from error
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _table_rows(files, tables):
    rows = []
    for table in tables:
        folder = table.removesuffix("transcripts.tsv")
        for number, line in _lines(files, table):
            name, tab, text = line.partition("\t")
            if not tab or not text.strip():
                raise ValueError(
                    f"{table}, line {number}: a line must hold the name of a file, a tab and what is said in it; "
                    f"received {line[:80]!r}."
                )
            name = folder + name
            rows.append((name, " ".join(text.split()), name.rpartition("/")[0].rsplit("/", 1)[-1]))
    return rows


def _sphinx_rows(files, transcripts):
    features = {name.rsplit("/", 1)[-1].removesuffix(".mfc"): name for name in files if name.endswith(".mfc")}
    rows = []
    for transcript in transcripts:
        for number, line in _lines(files, transcript):
            match = TRANSCRIPT.fullmatch(line)
            if not match or not match[1]:
                raise ValueError(
                    f"{transcript}, line {number}: a line must hold what is said and the name of the recording in "
                    f"parentheses; received {line[:80]!r}."
                )
            name = features.get(match[2], f"{match[2]}.mfc")
            rows.append((name, match[1], name.rpartition("/")[0].rsplit("/", 1)[-1]))
    return rows


def _read_features(file, sampling_rate, name):
    """What CMU Sphinx writes: how many numbers there are, and the numbers, 13 a frame, big-endian."""
    data = file.read()
    count = int.from_bytes(data[:4], "big")
    if len(data) != 4 + 4 * count or not count or count % 13:
        raise ValueError(
            f"{name} must hold 4 bytes with the number of values, and so many values of 4 bytes, 13 for each frame; "
            f"it has {len(data)} bytes, which begin with the number {count}"
        )
    return np.frombuffer(data[4:], ">f4").reshape(-1, 13).astype("float32"), None


def split_recordings(recordings, held_out, share=0.1, seed=0):
    """Splits recordings into a part to train on and a held-out part.

    Args:
        recordings: list of `Recording`.
        held_out: what to hold out, one of

            - `"speakers"`: a share of the speakers, with all that they say;
            - `"recordings"`: a share of the recordings;
            - `"test"`: numbers 0 to 4 of each digit and speaker, the test part of the Free Spoken Digit Dataset;
            - `"tuning"`: its numbers 5 to 9. The test part is left aside.
        share: float. How many speakers or recordings to hold out; one at least.
        seed: int. The same seed holds out the same.

    Returns:
        A tuple `(train, held_out)` of lists.

    Raises:
        ValueError: if `held_out` is unknown or does not suit the recordings, or one of the parts would be empty.

    Example:

    >>> recordings = [Recording(f"{digit}_ann_{i}.wav", None, digit, "ann") for digit in "38" for i in (0, 7, 40)]
    >>> train, held_out = split_recordings(recordings, "test")
    >>> [recording.name for recording in held_out], len(train)
    (['3_ann_0.wav', '8_ann_0.wav'], 4)
    """
    if held_out in ("speakers", "recordings"):
        groups = [recording.speaker if held_out == "speakers" else recording.name for recording in recordings]
        count = len(set(groups))
        if count < 2:
            raise ValueError(
                f"Two {held_out} or more are needed to hold one out; received {count}. One speaker's recordings are "
                "split with 'recordings'."
            )
        return split_by_group(recordings, groups, max(share, 1 / count), seed)
    if held_out not in ("test", "tuning"):
        raise ValueError(
            f"`held_out` must be one of 'speakers', 'recordings', 'test', 'tuning'; received {held_out!r}."
        )
    parts = {"test": [], "tuning": [], "rest": []}
    for recording in recordings:
        match = DIGIT_FILE.fullmatch(recording.name.rsplit("/", 1)[-1])
        if not match:
            raise ValueError(
                f"{held_out!r} is a part of the Free Spoken Digit Dataset; received {recording.name} among the "
                "recordings. Hold out 'speakers' or 'recordings'."
            )
        parts["test" if int(match[3]) < 5 else "tuning" if int(match[3]) < 10 else "rest"].append(recording)
    if held_out == "test":
        parts["rest"] = sorted(parts["rest"] + parts["tuning"], key=lambda recording: recording.name)
    if not parts["rest"] or not parts[held_out]:
        raise ValueError(
            f"{held_out!r} would leave {len(parts['rest'])} recordings to train on and {len(parts[held_out])} held out."
        )
    return parts["rest"], parts[held_out]


def change_speed(sound, factor):
    """A sound spoken faster or slower.

    A wave changes its pitch with its speed, as a tape does; features are interpolated between frames.

    Args:
        sound: array float32, `[samples]` or `[frames, features]`.
        factor: float. 1.1 is a tenth faster.

    Returns:
        Array float32 of about `1 / factor` of the length.

    Reference: [Audio Augmentation for Speech Recognition](https://www.danielpovey.com/files/2015_interspeech_augmentation.pdf).

    Example:

    >>> import numpy as np
    >>> change_speed(np.zeros(1000, "float32"), 1.25).shape, change_speed(np.zeros((90, 13), "float32"), 0.9).shape
    ((800,), (100, 13))
    """
    if factor == 1:
        return sound
    if sound.ndim == 1:
        import soxr

        return soxr.resample(sound, 1000 * factor, 1000)
    places = np.linspace(0, len(sound) - 1, max(1, round(len(sound) / factor)))
    columns = [np.interp(places, np.arange(len(sound)), column) for column in sound.T]
    return np.stack(columns, axis=-1).astype("float32")
