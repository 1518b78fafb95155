"""Memory that is freed stays with the process once `keep_memory` was called."""

import json
import subprocess
import sys

import pytest

import keras_transformer as kt
from keras_transformer.training import allocation

# Takes and frees blocks of 80 MB, here or in another thread, and counts how many pages the system had to bring. Each
# case has a process of its own, since what the C library was told cannot be taken back.
FAULTS = """
import itertools, json, multiprocessing, resource, threading
from keras_transformer.training import keep_memory

def take(counts):
    for _ in range(4):
        block = bytearray(80 * 2**20)
        del block
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

def measure(kept, place, results):
    told, counts = keep_memory() if kept else None, []
    if place == "thread":
        thread = threading.Thread(target=take, args=(counts,))
        thread.start()
        thread.join()
    else:
        take(counts)
    results.put((place, kept, told, counts[-1] - counts[0]))

fork = multiprocessing.get_context("fork")
for case in itertools.product((True, False), ("main", "thread")):
    results = fork.SimpleQueue()
    process = fork.Process(target=measure, args=(*case, results))
    process.start()
    print(json.dumps(results.get()))
    process.join()
"""


@pytest.fixture(scope="module")
def faults():
    """By where the blocks were taken, and whether memory was to be kept: what the C library said, and the faults."""
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=300)
    return {(place, kept): result for place, kept, *result in map(json.loads, found.stdout.splitlines())}


@pytest.mark.parametrize("place", ["main", "thread"])
def test_blocks_are_used_again(faults, place):
    told, kept = faults[place, True]
    if not told:
        pytest.skip("the C library is not glibc")
    _, given_back = faults[place, False]
    assert given_back > 3 * 80 * 2**20 / 4096 / 2  # Half of the pages at least, however large they are here.
    assert kept < given_back / 20


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: pytest.fail("was told"))
    assert kt.training.keep_memory() is False
