"""A checkpoint gives the tensors that were written, whoever wrote them; damage and malice are found on opening."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from keras_transformer.pretrained.checkpoint import Checkpoint, read_json, write_checkpoint

safetensors_numpy = pytest.importorskip("safetensors.numpy")
torch = pytest.importorskip("torch")

CONFIGURATION = {"model_type": "tiny", "architectures": ["TinyModel"]}


def arrays():
    generator = np.random.default_rng(0)
    return {
        "flags": generator.integers(0, 2, 3).astype(
            "bool"
        ),  # 3 bytes: what follows it in the file would not be aligned
        "single": generator.normal(size=(3, 5)).astype("float32"),
        "half": generator.normal(size=(7,)).astype("float16"),
        "brain": generator.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
        "eight": generator.normal(size=(5,)).astype(ml_dtypes.float8_e4m3fn),
        "ids": generator.integers(-9, 9, (4,)),
        "scalar": np.array(1.5, "float32"),
        "empty": np.zeros((0, 3), "float16"),
    }


def assert_same(checkpoint, expected):
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, array in expected.items():
        read = checkpoint.read(name)
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (array.shape, array.dtype.name)
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        assert read.tobytes() == array.tobytes(), name
        assert not read.flags.writeable


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def pack(header, body=b"", length=None):
    """The bytes of a safetensors file with any header, honest or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def save_torch(directory, tensors, name="pytorch_model.bin"):
    directory.mkdir(exist_ok=True)
    torch.save(tensors, directory / name)


# Round trips


@pytest.mark.parametrize("shard_bytes", [2**30, 50, 1])
def test_written_is_read(tmp_path, shard_bytes):
    files = {"generation_config.json": {"b": 1, "a": [None, "ü"]}}
    write_checkpoint(tmp_path / "new" / "model", CONFIGURATION, arrays(), files, shard_bytes=shard_bytes)
    directory = tmp_path / "new" / "model"
    with Checkpoint(directory) as checkpoint:
        assert_same(checkpoint, arrays())
        assert len(checkpoint) == len(arrays()) and "half" in checkpoint and "other" not in checkpoint
        assert all(checkpoint.read(name).flags.aligned for name in checkpoint)
    assert read_json(directory, "generation_config.json") == files["generation_config.json"]
    assert (directory / "config.json").read_text() == json.dumps(CONFIGURATION, indent=2, sort_keys=True) + "\n"
    shards = list(directory.glob("model-*.safetensors"))
    assert len(shards) == {2**30: 0, 50: 5, 1: 8}[shard_bytes]
    assert not [name for name in os.listdir(directory) if name.startswith(".")]


@pytest.mark.parametrize("shard_bytes", [2**30, 50])
def test_other_libraries_read_what_is_written(tmp_path, shard_bytes):
    from safetensors import safe_open

    write_checkpoint(tmp_path, CONFIGURATION, arrays(), shard_bytes=shard_bytes)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert sorted(found) == sorted(arrays())
    for name, array in arrays().items():
        assert tuple(found[name].shape) == array.shape
        assert str(found[name].dtype) == f"torch.{array.dtype.name}"
        np.testing.assert_array_equal(found[name].double().numpy(), array.astype("float64"))


def test_files_of_the_safetensors_library_are_read(tmp_path):
    from safetensors.torch import save_file

    plain = {name: array for name, array in arrays().items() if name != "eight"}
    safetensors_numpy.save_file(plain, tmp_path / "model.safetensors")
    assert_same(Checkpoint(tmp_path), plain)
    tensors = {
        "bfloat16": torch.randn(4, 3, dtype=torch.bfloat16),
        "float8_e5m2": torch.randn(9).to(torch.float8_e5m2),
        "int64": torch.arange(5),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert checkpoint.dtype(name) == name
        np.testing.assert_array_equal(checkpoint.read(name).astype("float64"), tensor.double().numpy())


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    configuration = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=10,
    )
    return transformers.BertModel(configuration)


def test_transformers_and_this_library_read_each_other(bert, tmp_path):
    state = {name: tensor.numpy() for name, tensor in bert.state_dict().items()}
    bert.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    checkpoint = Checkpoint(tmp_path / "theirs")
    assert_same(checkpoint, state)
    configuration = read_json(tmp_path / "theirs", "config.json")
    for shard_bytes in (2**30, 4000):  # The second time over the first, which was in one file.
        write_checkpoint(tmp_path / "ours", configuration, checkpoint, shard_bytes=shard_bytes)
        back = type(bert).from_pretrained(tmp_path / "ours").state_dict()
        assert sorted(back) == sorted(state)
        assert all(np.array_equal(back[name].numpy(), array) for name, array in state.items())
    assert not (tmp_path / "ours" / "model.safetensors").exists()


def test_arrays_of_any_layout_are_written(tmp_path):
    matrix = np.arange(12, dtype="float32").reshape(3, 4)
    tensors = {"transposed": matrix.T, "strided": matrix[:, ::2], "big": matrix.astype(">f4"), "number": 3}
    write_checkpoint(tmp_path, CONFIGURATION, iter(tensors.items()))
    checkpoint = Checkpoint(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint[name], array)
        assert checkpoint.shape(name) == np.shape(array)


def test_no_tensors_at_all(tmp_path):
    write_checkpoint(tmp_path, CONFIGURATION, {})
    assert Checkpoint(tmp_path).names() == ()


def test_arrays_outlive_the_checkpoint(tmp_path):
    write_checkpoint(tmp_path, CONFIGURATION, arrays())
    with Checkpoint(tmp_path) as checkpoint:
        single = checkpoint.read("single")
        with pytest.raises(KeyError, match="`name` must be one of the 8 tensors .*'double'"):
            checkpoint.read("double")
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("single")
    # The file is replaced, not written into.
    write_checkpoint(tmp_path, CONFIGURATION, {"single": np.zeros((3, 5), "float32")})
    np.testing.assert_array_equal(single, arrays()["single"])


# Memory


def test_reading_copies_nothing_and_writing_holds_one_tensor(tmp_path):
    size = 2**22
    tracemalloc.start()
    try:
        stream = ((f"part{index:02}", np.full(size, index, "uint8")) for index in range(12))
        write_checkpoint(tmp_path, CONFIGURATION, stream, shard_bytes=5 * size)
        _, peak_of_writing = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        checkpoint = Checkpoint(tmp_path)
        everything = [checkpoint.read(name) for name in checkpoint]
        _, peak_of_reading = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [array[-1] for array in everything] == list(range(12))
    # Of 48 MiB.
    assert peak_of_writing < 2 * size
    assert peak_of_reading - before < size // 4


# Bad files

TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
BAD_FILES = {
    "nothing in it": (b"", "must begin with 8 bytes"),
    "a few bytes": (b"\x01\x02\x03", "must begin with 8 bytes"),
    "header not there": (pack(b"{}", length=50), "claims a header of 50 bytes in a file of 10"),
    "huge header": (pack(b"{}", length=2**60), f"claims a header of {2**60} bytes"),
    "all bits set": (pack(b"{}", length=2**64 - 1), "claims a header"),
    "a pickle under this name": (pickle.dumps(list(range(99))), "claims a header"),
    "not JSON": (pack(b"{'a': 1}"), "The header of .* must be JSON"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "must be JSON in UTF-8"),
    "nested too deep": (pack(b'{"a":' * 100_000), "must be JSON"),
    "not an object": (pack([1, 2]), "must be a JSON object; it is a list"),
    "duplicate tensor": (pack(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "repeats 'a'"),
    "duplicate field": (
        pack(b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        "repeats 'dtype'",
    ),
    "entry not an object": (pack({"a": 3}), "'a' .* must have `dtype`, `shape` and `data_offsets`; received 3"),
    "field missing": (pack({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "must have `dtype`"),
    "unknown dtype": (pack({"a": entry("F31")}, bytes(8)), "'a' .* must have one of the dtypes .*received 'F31'"),
    "six-bit dtype": (pack({"a": entry("F6_E2M3", (4,), (0, 3))}, bytes(3)), "received 'F6_E2M3'"),
    "dtype a list": (pack({"a": entry(["F32"])}, bytes(8)), "must have one of the dtypes"),
    "negative size": (pack({"a": entry(shape=(-1, -2))}, bytes(8)), "must have a shape of at most 32 sizes"),
    "fractional size": (pack({"a": entry(shape=(2.0,))}, bytes(8)), "must have a shape"),
    "true as a size": (pack({"a": entry(shape=(2, True))}, bytes(8)), "must have a shape"),
    "too many sizes": (pack({"a": entry(shape=(1,) * 33 + (2,))}, bytes(8)), "must have a shape of at most 32 sizes"),
    "size no array has": (pack({"a": entry(shape=(0, 2**62), offsets=(0, 0))}), "must have a shape that an array"),
    "sizes that overflow": (pack({"a": entry(shape=(2**32, 2**32, 2))}, bytes(8)), "must take .* bytes; it has 8"),
    "shape too large": (pack({"a": entry(shape=(3,))}, bytes(8)), "must take 12 bytes; it has 8"),
    "dtype too narrow": (pack({"a": entry("F16")}, bytes(8)), "F16 of shape .* must take 4 bytes; it has 8"),
    "offsets beyond": (pack({"a": entry(offsets=(4, 12))}, bytes(8)), "must lie within the 8 bytes"),
    "offsets backwards": (pack({"a": entry(offsets=(8, 0))}, bytes(8)), "must lie within the 8 bytes"),
    "offsets negative": (pack({"a": entry(offsets=(-8, 0))}, bytes(8)), "must lie within the 8 bytes"),
    "three offsets": (pack({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "must lie within the 8 bytes"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "an overlap at 'b'"),
    "same place twice": (pack({"a": entry(), "b": entry()}, bytes(8)), "an overlap at 'b'"),
    "hole between": (pack({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "a hole before 'b'"),
    "hole at the start": (pack({"a": entry(offsets=(4, 12))}, bytes(12)), "a hole before 'a'"),
    "bytes after the end": (pack(TWO, bytes(17)), "must end with its last tensor, 16 bytes .* goes on to 17"),
    "cut short": (pack(TWO, bytes(15)), "'b' .* must lie within the 15 bytes .* cut short"),
    "metadata not strings": (pack({"__metadata__": {"format": 1}}), "`__metadata__` .* must map strings"),
    "metadata a list": (pack({"__metadata__": ["pt"]}), "`__metadata__` .* must map strings"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_on_opening(tmp_path, case):
    content, message = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert len(str(caught.value)) < 1000
    # The same file as a shard is refused as well, by an error that names index and shard.
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with pytest.raises(ValueError, match=f"index.json names the shard 'part.safetensors', .*{message}"):
        Checkpoint(tmp_path)


def test_the_good_neighbour_of_the_bad_files_is_accepted(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(pack(TWO, np.arange(4, dtype="float32").tobytes()))
    np.testing.assert_array_equal(Checkpoint(tmp_path)["b"], [2, 3])


def test_every_way_of_cutting_a_file_short_is_found(tmp_path):
    write_checkpoint(tmp_path, CONFIGURATION, {"a": np.ones(3, "float32"), "b": np.ones(2, "int64")})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            Checkpoint(tmp_path)


def test_damage_is_judged_as_the_safetensors_library_judges_it(tmp_path):
    from safetensors import SafetensorError, safe_open

    path = tmp_path / "model.safetensors"
    write_checkpoint(tmp_path, CONFIGURATION, arrays())
    whole = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    digits = [place for place in range(8, header_end) if chr(whole[place]).isdigit()]
    generator = np.random.default_rng(0)
    accepted = 0
    for case in range(900):
        damaged = bytearray(whole)
        if case % 3 == 0:  # Another number.
            damaged[generator.choice(digits)] = generator.choice(list(b"0123456789"))
        elif case % 3 == 1:  # Another character.
            damaged[generator.integers(header_end)] = generator.choice(list(b'0123456789,[]{}":-. eFIBU\0\xff'))
        else:  # A piece lost.
            place = generator.integers(len(whole))
            del damaged[place : place + generator.integers(1, 9)]
        path.write_bytes(damaged)
        try:
            with safe_open(path, framework="pt") as file:
                expected = sorted(file.keys())
        except SafetensorError:
            with pytest.raises(ValueError, match=re.escape(str(path))):
                Checkpoint(tmp_path)
        else:
            accepted += 1
            checkpoint = Checkpoint(tmp_path)
            assert sorted(checkpoint) == expected
            assert all(checkpoint[name].shape == checkpoint.shape(name) for name in checkpoint)
    assert 20 < accepted < 300


INDEX = "model.safetensors.index.json"
BAD_INDEXES = {
    "not JSON": (b"{", ValueError, "must be JSON"),
    "no weight map": (b'{"metadata": {}}', ValueError, "must have a `weight_map`"),
    "weight map a list": (b'{"weight_map": ["good.safetensors"]}', ValueError, "must have a `weight_map`"),
    "shard a number": (b'{"weight_map": {"a": 3}}', ValueError, "must have a `weight_map`"),
    "duplicate key": (b'{"weight_map": {"a": "good.safetensors", "a": "x"}}', ValueError, "repeats 'a'"),
    "missing shard": ({"a": "gone.safetensors"}, FileNotFoundError, "names the shard 'gone.safetensors'"),
    "missing tensor": ({"z": "good.safetensors"}, ValueError, "good.safetensors must hold the tensor 'z' that"),
    "parent": ({"a": "../outside.safetensors"}, ValueError, "must be a plain name in it; received '../outside"),
    "parent itself": ({"a": ".."}, ValueError, "must be a plain name"),
    "itself": ({"a": "."}, ValueError, "must be a plain name"),
    "no name": ({"a": ""}, ValueError, "must be a plain name"),
    "absolute": ({"a": "ABSOLUTE"}, ValueError, "must be a plain name"),
    "folder": ({"a": "folder/good.safetensors"}, ValueError, "must be a plain name"),
    "backslash": ({"a": "..\\outside.safetensors"}, ValueError, "must be a plain name"),
    "drive": ({"a": "C:good.safetensors"}, ValueError, "must be a plain name"),
    "zero byte": ({"a": "good.safetensors\0"}, ValueError, "must be a plain name"),
    "link to a file outside": ({"a": "link.safetensors"}, ValueError, "must stay within its directory"),
    "link through a link": ({"a": "twice.safetensors"}, ValueError, "must stay within its directory"),
    "dangling link": ({"a": "dangling.safetensors"}, FileNotFoundError, "must be a file of the checkpoint"),
    "a directory": ({"a": "folder"}, FileNotFoundError, "must be a file of the checkpoint"),
    "a pipe": ({"a": "pipe"}, FileNotFoundError, "must be a file of the checkpoint"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_refused_on_opening(tmp_path, case):
    content, kind, message = BAD_INDEXES[case]
    directory = tmp_path / "model"
    (directory / "folder").mkdir(parents=True)
    good = pack(TWO, bytes(16))
    for path in (
        directory / "good.safetensors",
        directory / "folder" / "good.safetensors",
        tmp_path / "outside.safetensors",
    ):
        path.write_bytes(good)
    (directory / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (directory / "twice.safetensors").symlink_to("link.safetensors")
    (directory / "dangling.safetensors").symlink_to("gone.safetensors")
    os.mkfifo(directory / "pipe")
    if isinstance(content, dict):
        content = json.dumps({"weight_map": content}).replace("ABSOLUTE", str(directory / "good.safetensors")).encode()
    (directory / INDEX).write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        Checkpoint(directory)
    assert str(directory / INDEX) in str(caught.value)


def test_links_within_the_directory_and_into_the_blobs_of_a_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--tiny" / "snapshots" / "0a1b2c", tmp_path / "models--tiny" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "blobs"):
        folder.mkdir(parents=True)
    (blobs / "ff01").write_bytes(pack(TWO, bytes(16)))
    (blobs / "ff02").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    (snapshot / INDEX).symlink_to("../../blobs/ff02")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/ff01")
    assert Checkpoint(snapshot).shape("a") == (2,)
    # The checkpoint may itself be reached through a link.
    (tmp_path / "short").symlink_to(snapshot)
    assert Checkpoint(tmp_path / "short").shape("a") == (2,)
    # A blobs folder elsewhere, or beside a directory that is no snapshot, is outside.
    (tmp_path / "blobs" / "ff01").write_bytes(pack(TWO, bytes(16)))
    (snapshot / "model-00001-of-00001.safetensors").unlink()
    (snapshot / "model-00001-of-00001.safetensors").symlink_to(tmp_path / "blobs" / "ff01")
    with pytest.raises(ValueError, match="must stay within its directory, or in a hub cache within `blobs`"):
        Checkpoint(snapshot)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "stored").write_bytes(pack(TWO, bytes(16)))
    (plain / "model.safetensors").symlink_to("stored")
    assert Checkpoint(plain).shape("a") == (2,)
    (plain / "model.safetensors").unlink()
    (plain / "model.safetensors").symlink_to("../blobs/ff01")
    with pytest.raises(ValueError, match="must stay within its directory"):
        Checkpoint(plain)


def test_no_weights_and_no_directory(tmp_path):
    (tmp_path / "README.md").write_text("empty")
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors or .*README.md"):
        Checkpoint(tmp_path)
    for path in (tmp_path / "gone", tmp_path / "README.md"):
        with pytest.raises(FileNotFoundError, match=f"`directory` must be a checkpoint directory; .*{path.name}"):
            Checkpoint(path)


@pytest.mark.parametrize(
    "content, kind, message",
    [
        (None, FileNotFoundError, "must be a file of the checkpoint"),
        (b"[1]", ValueError, "must be a JSON object; it is a list"),
        (b'{"a": 1,}', ValueError, "must be JSON in UTF-8"),
        (b'{"a": "\xe4"}', ValueError, "must be JSON in UTF-8"),
        (b'{"a": %b}' % (b"9" * 5000), ValueError, "must be JSON"),
        (b'{"a": {"b": 1, "b": 2}}', ValueError, "repeats 'b'"),
    ],
)
def test_read_json_names_the_file(tmp_path, content, kind, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        read_json(tmp_path, "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)


def test_read_json_stays_in_the_directory(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="must be a plain name"):
        read_json(tmp_path / "model", "../secret.json")


# Pickles


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def tensors():
    matrix = torch.arange(12.0).reshape(3, 4)
    return {
        "single": matrix,
        "transposed": matrix.T,
        "brain": matrix.bfloat16(),
        "eight": matrix.to(torch.float8_e4m3fn),
        "ids": torch.arange(3),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "index"])
def test_pickles_are_read_only_when_allowed(tmp_path, name):
    if name == "index":
        save_torch(tmp_path, tensors(), "pytorch_model-00001-of-00001.bin")
        weight_map = dict.fromkeys(tensors(), "pytorch_model-00001-of-00001.bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_torch(tmp_path, tensors(), name)
    with pytest.raises(ValueError, match="it has a pickle, .*allow_pickle=True.*write_checkpoint"):
        Checkpoint(tmp_path)
    checkpoint = Checkpoint(tmp_path, allow_pickle=True)
    expected = {
        key: tensor.detach().double().numpy().astype(getattr(ml_dtypes, str(tensor.dtype)[6:], str(tensor.dtype)[6:]))
        for key, tensor in tensors().items()
    }
    assert_same(checkpoint, expected)
    if name == "weights.pt":
        # The conversion that the error proposes, in the same directory.
        write_checkpoint(tmp_path, CONFIGURATION, checkpoint)
        assert_same(Checkpoint(tmp_path), expected)


BAD_PICKLES = {
    "list": [torch.ones(2)],
    "nested": {"model": {"a": torch.ones(2)}},
    "number as a name": {1: torch.ones(2)},
    "sparse": {"a": torch.eye(2).to_sparse()},
    "complex of 16 bytes": {"a": torch.ones(2, dtype=torch.complex128)},
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_pickles_of_anything_else_are_refused(tmp_path, case):
    save_torch(tmp_path, BAD_PICKLES[case])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        Checkpoint(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("writer", ["torch", "old torch", "pickle"])
def test_no_code_from_a_pickle_runs(tmp_path, monkeypatch, writer):
    trace, directory = tmp_path / "trace", tmp_path / "model"
    directory.mkdir()
    content, path = {"a": torch.ones(2), "b": Payload(trace)}, directory / "pytorch_model.bin"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ValueError, match="allow_pickle"):
        Checkpoint(directory)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match=re.escape(f"{path} must be tensors alone")):
        Checkpoint(directory, allow_pickle=True)
    assert not trace.exists()
    # The payload is live: a careless reader would have run it.
    careless = pickle.loads(path.read_bytes()) if writer == "pickle" else torch.load(path, weights_only=False)
    careless["b"].close()
    assert trace.exists()


def test_damaged_and_ambiguous_pickles_are_refused(tmp_path):
    save_torch(tmp_path, {"a": torch.ones(100)}, "one.pt")
    whole = (tmp_path / "one.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "one.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"one\.pt must be tensors alone"):
            Checkpoint(tmp_path, allow_pickle=True)
    save_torch(tmp_path, {"a": torch.ones(2)}, "two.pt")
    with pytest.raises(ValueError, match=r"must hold one file of weights; it has \['one.pt', 'two.pt'\]"):
        Checkpoint(tmp_path, allow_pickle=True)


def test_safetensors_go_before_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    safetensors_numpy.save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path, allow_pickle=True).names() == ("a",)


# Writing over what is there


def test_the_same_model_is_replaced_and_other_files_stay(tmp_path):
    write_checkpoint(tmp_path, CONFIGURATION, arrays(), shard_bytes=50)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter.safetensors").write_text("of someone else")
    changed = {**CONFIGURATION, "hidden_size": 3}
    write_checkpoint(tmp_path, changed, {"a": np.ones(3)}, {"generation_config.json": {}})
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "adapter.safetensors",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert read_json(tmp_path, "config.json") == changed
    assert Checkpoint(tmp_path).names() == ("a",)
    # From one file to shards, and to fewer shards.
    for shard_bytes, count in ((1, 8), (50, 5)):
        write_checkpoint(tmp_path, changed, arrays(), shard_bytes=shard_bytes)
        assert len(list(tmp_path.glob("model*.safetensors"))) == count
        assert_same(Checkpoint(tmp_path), arrays())
    assert (tmp_path / "README.md").read_text() == "about"


def test_a_checkpoint_can_be_written_over_itself(tmp_path):
    write_checkpoint(tmp_path, CONFIGURATION, arrays())
    write_checkpoint(tmp_path, CONFIGURATION, Checkpoint(tmp_path), shard_bytes=50)
    write_checkpoint(tmp_path, CONFIGURATION, Checkpoint(tmp_path), shard_bytes=30)
    assert_same(Checkpoint(tmp_path), arrays())


OTHER_MODELS = {
    "another type": (
        {"config.json": b'{"model_type": "bert", "architectures": ["TinyModel"]}'},
        "model_type 'tiny'.*'bert'",
    ),
    "another head": ({"config.json": b'{"model_type": "tiny"}'}, r"architectures \['TinyModel'\].*None"),
    "broken configuration": ({"config.json": b"{"}, "config.json must be JSON"),
    "weights alone": ({"model.safetensors": b""}, "has weights, model.safetensors, and no config.json"),
    "shards alone": ({"model-00001-of-00002.safetensors": b""}, "has weights, model-00001-of-00002.safetensors"),
    "index alone": ({INDEX: b""}, "has weights, model.safetensors.index.json"),
    "pickle alone": ({"pytorch_model.bin": b""}, "has weights, pytorch_model.bin"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_another_model_is_not_overwritten(tmp_path, case):
    there, message = OTHER_MODELS[case]
    for name, content in there.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        write_checkpoint(tmp_path, CONFIGURATION, arrays())
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == there


def failing(pairs):
    yield from pairs
    raise KeyboardInterrupt


class Changing(dict):
    """Arrays that grow each time they are asked for."""

    def __getitem__(self, name):
        self[name] = np.stack([super().__getitem__(name)] * 2)
        return super().__getitem__(name)


class Broken(dict):
    """Arrays of which one can be asked for once."""

    def __getitem__(self, name):
        array = super().__getitem__(name)
        if name == "ids":
            self[name] = None
            if array is None:
                raise OSError("the device is gone")
        return array


BAD_CALLS = {
    "arrays that change": (lambda: {"tensors": Changing(arrays())}, ValueError, "must not change while it is written"),
    "arrays that go": (lambda: {"tensors": Broken(arrays())}, OSError, "the device is gone"),
    "arrays that go in a late shard": (
        lambda: {"tensors": Broken(arrays()), "shard_bytes": 10},
        OSError,
        "the device is gone",
    ),
    "interrupted": (lambda: {"tensors": failing(arrays().items())}, KeyboardInterrupt, ""),
    "interrupted in a late shard": (
        lambda: {"tensors": failing(arrays().items()), "shard_bytes": 10},
        KeyboardInterrupt,
        "",
    ),
    "name twice": (
        lambda: {"tensors": [("a", 1), ("b", 2), ("a", 3)]},
        ValueError,
        "must have each name once; received 'a' twice",
    ),
    "name twice in two shards": (
        lambda: {"tensors": [("a", 1), ("b", 2), ("a", 3)], "shard_bytes": 1},
        ValueError,
        "must have each name once; received 'a' twice",
    ),
    "name not a string": (lambda: {"tensors": {3: np.ones(2)}}, ValueError, "strings as names"),
    "name of the metadata": (lambda: {"tensors": {"__metadata__": np.ones(2)}}, ValueError, "'__metadata__'"),
    "name no UTF-8": (lambda: {"tensors": {"\ud800": np.ones(2)}}, ValueError, "surrogates"),
    "objects": (lambda: {"tensors": {"a": np.array([None])}}, ValueError, "must have dtypes among .*'a' has object"),
    "strings": (lambda: {"tensors": {"a": np.array(["x"])}}, ValueError, "'a' has str"),
    "complex128": (lambda: {"tensors": {"a": np.ones(2, "complex128")}}, ValueError, "'a' has complex128"),
    "four bits": (lambda: {"tensors": {"a": np.ones(2, ml_dtypes.int4)}}, ValueError, "'a' has int4"),
    "no shards": (lambda: {"shard_bytes": 0}, ValueError, "`shard_bytes` must be a positive integer; received 0"),
    "fractional shards": (lambda: {"shard_bytes": 5e9}, ValueError, "`shard_bytes` must be"),
    "file in a folder": (lambda: {"files": {"a/b.json": {}}}, ValueError, "`files` .*received 'a/b.json'"),
    "file outside": (lambda: {"files": {"../b.json": {}}}, ValueError, "`files` .*received '../b.json'"),
    "configuration twice": (lambda: {"files": {"config.json": {}}}, ValueError, "`files` .*'config.json'"),
    "index twice": (lambda: {"files": {INDEX: {}}}, ValueError, "`files` .*index"),
    "file not JSON": (lambda: {"files": {"model.safetensors": {}}}, ValueError, "`files` .*'model.safetensors'"),
    "content not JSON": (lambda: {"files": {"a.json": {"b": np.ones(2)}}}, TypeError, "not JSON serializable"),
    "configuration not JSON": (lambda: {"configuration": {**CONFIGURATION, "b": {1, 2}}}, TypeError, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_failed_save_changes_nothing(tmp_path, case):
    make, kind, message = BAD_CALLS[case]
    arguments = {"configuration": CONFIGURATION, "tensors": arrays(), **make()}
    old = tmp_path / "old"
    write_checkpoint(old, CONFIGURATION, arrays(), {"generation_config.json": {"a": 1}}, shard_bytes=50)
    before = contents(old)
    with pytest.raises(kind, match=message):
        write_checkpoint(old, **arguments)
    assert contents(old) == before
    # A directory that was not there is not there afterwards.
    arguments = {**arguments, **make()}
    with pytest.raises(kind, match=message):
        write_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("shard_bytes", [2**30, 50])
def test_a_failure_at_any_rename_leaves_the_old_files(tmp_path, monkeypatch, shard_bytes):
    write_checkpoint(tmp_path, CONFIGURATION, arrays(), {"generation_config.json": {"a": 1}}, shard_bytes=50)
    before = contents(tmp_path)
    assert len(before) == 8
    real, failures = Path.replace, 0
    for fail_at in range(100):
        calls = []

        def replace(source, target, calls=calls, fail_at=fail_at):
            calls.append(source)
            if len(calls) == fail_at + 1:
                raise OSError("no space left on device")
            return real(source, target)

        monkeypatch.setattr(Path, "replace", replace)
        new = {name: array + np.ones((), array.dtype) for name, array in arrays().items() if name != "flags"}
        try:
            write_checkpoint(tmp_path, CONFIGURATION, new, {"generation_config.json": {}}, shard_bytes=shard_bytes)
        except OSError:
            failures += 1
            assert contents(tmp_path) == before
        else:
            break
    assert failures == {2**30: 8 + 3, 50: 8 + 7}[shard_bytes]
    assert_same(Checkpoint(tmp_path), new)


def test_a_process_killed_between_renames_leaves_no_mixture(tmp_path):
    # Killed at each rename in turn: there are the old files, or no configuration, or all of the new files.
    write_checkpoint(tmp_path / "old", CONFIGURATION, {"a": np.zeros(2), "b": np.zeros(2)}, shard_bytes=16)
    code = f"""
import os, shutil, numpy as np
from pathlib import Path
from keras_transformer.pretrained.checkpoint import write_checkpoint
real = Path.replace
for kill_at in range(9):
    directory = Path({str(tmp_path)!r}, str(kill_at))
    shutil.copytree({str(tmp_path / "old")!r}, directory)
    if os.fork() == 0:
        calls = []
        def replace(source, target):
            calls.append(source)
            if len(calls) == kill_at + 1:
                os._exit(9)
            return real(source, target)
        Path.replace = replace
        write_checkpoint(directory, {CONFIGURATION!r}, {{"a": np.ones(2), "b": np.ones(2)}}, shard_bytes=16)
        os._exit(0)
    os.wait()
"""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
    complete = []
    for kill_at in range(9):
        directory = tmp_path / str(kill_at)
        if (directory / "config.json").exists():
            checkpoint = Checkpoint(directory)
            complete.append([checkpoint["a"][0], checkpoint["b"][0]])
    assert complete == [[0, 0], [1, 1]]


# What is imported


def test_reading_and_writing_need_numpy_alone(tmp_path):
    code = f"""
import sys, numpy as np
import keras_transformer
assert not {{"safetensors", "torch", "tokenizers", "transformers"}} & sys.modules.keys()
from keras_transformer.pretrained.checkpoint import Checkpoint, write_checkpoint
write_checkpoint({str(tmp_path)!r}, {{}}, {{"a": np.ones(2)}})
assert Checkpoint({str(tmp_path)!r})["a"].sum() == 2
assert not {{"safetensors", "torch", "tokenizers", "transformers"}} & sys.modules.keys()
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
