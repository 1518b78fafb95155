"""What a call carries besides its tensors: a key-value cache, a recording.

A scope is ambient: layers ask for the current one while they are called, and blocks and models know nothing of it.
Threads do not see each other's scopes.
"""

import contextlib
import threading

from keras import ops

from keras_transformer.ops.masks import first_real

__all__ = ["DecodingScope", "RecordingScope"]


class _Current(threading.local):
    """The current scope of each thread, which torch can read while it compiles; a context variable it cannot."""

    scope = None


_decoding, _recording = _Current(), _Current()


class Scope:
    """A context manager that makes itself the current one of its kind, and names the calls made under it."""

    _current = None

    def __init__(self):
        self._calls = {}
        self._outer = []

    def __enter__(self):
        self._calls = {}
        self._outer.append(self._current.scope)
        self._current.scope = self
        return self

    def __exit__(self, *_):
        self._current.scope = self._outer.pop()

    def call_name(self, layer):
        """Path of `layer`; from its second call under this scope on followed by `@1`, `@2`, ..."""
        path = _own_path(layer)
        count = self._calls.get(path, 0)
        self._calls[path] = count + 1
        return numbered(path, count)


class DecodingScope(Scope):
    """Lets attention layers keep keys and values from call to call, so that a model decodes token by token.

    The first call (the prompt) under a scope without a cache allocates one; later calls pass the cache on. Under the
    scope a model's token input holds only the new tokens: self-attention appends their keys and values to the cache
    and attends to all of it, cross-attention computes keys and values at the first call alone, and
    `PositionalEmbedding` counts on from where it was.

    Args:
        cache: dict that an earlier scope left in its `cache` attribute, or None to start.
        index: int or scalar int tensor. How many tokens the cache holds, padding included.
        max_length: int. How many tokens the cache has room for. Needed where `cache` is None.
        padding_mask: boolean tensor of shape `[B, T]`, True where the tokens of this call are real. Prompts of
            different lengths are padded on the left, so that all rows go on at the same index.
        branches: `Branches`, where the tokens of a call are not one after the other but alternatives of each other, as
            the beams of a beam search are; or None.
        products: `StepProducts`, which computes `Dense` layers and tied output projections in their place, or None.

    Attributes:
        cache: nested dict of tensors (`{call name: {"key": [B, K, max_length, D], ...}}`) to hand to the next scope.
            Keys and values of a batch that is known to be a single row have no axis for it.

    Raises:
        ValueError: if neither `cache` nor `max_length` is given, or a call goes past `max_length`.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> tokens = keras.Input((None,), dtype="int32", name="token_ids")
    >>> x = kt.layers.DecoderBlock(2, 16)(keras.layers.Embedding(10, 8)(tokens))
    >>> model = keras.Model(tokens, x)
    >>> whole = model(np.array([[3, 1, 4]]))
    >>> with kt.scopes.DecodingScope(max_length=8) as scope:
    ...     start = model(np.array([[3, 1]]))
    >>> with kt.scopes.DecodingScope(scope.cache, index=2):
    ...     last = model(np.array([[4]]))
    >>> bool(np.allclose(keras.ops.convert_to_numpy(whole[:, 2:]), keras.ops.convert_to_numpy(last), atol=1e-5))
    True
    """

    _current = _decoding

    def __init__(self, cache=None, index=0, max_length=None, padding_mask=None, branches=None, products=None):
        super().__init__()
        if not cache and max_length is None:
            raise ValueError("`DecodingScope` needs a `cache` from an earlier scope, or the `max_length` of a new one.")
        self.cache = {} if cache is None else dict(cache)
        self.index = index
        kept = (ops.shape(entry["key"])[-2] for entry in self.cache.values() if "key" in entry)
        self.max_length = next(kept, max_length)
        self.padding_mask = padding_mask
        self.branches = branches
        self.products = products
        self._first = not self.cache and isinstance(index, int) and index == 0

    def positions(self, length):
        """Positions of the `length` tokens of this call: int32 tensor of shape `[length]`."""
        index = ops.cast(self.index, "int32")
        if self.branches is not None:
            return ops.full((length,), index, dtype="int32")
        return ops.arange(length, dtype="int32") + index

    def key_positions(self, length):
        """Positions of all that a call with `length` tokens may attend to: int32 tensor `[S]`, S as in `append`."""
        places = ops.arange(length if self._first else self.max_length, dtype="int32")
        return places if self.branches is None else self.branches.positions(places)

    def total(self, length):
        """How many tokens a row has after a call with `length` of them."""
        return self.index + (length if self.branches is None else 1)

    def among_branches(self, mask):
        """A mask `[B|1, T, S]` narrowed to what the branch of each token has in it."""
        return mask if self.branches is None else ops.logical_and(mask, self.branches.visible(self.max_length))

    def real(self, mask):
        """What of this call is real: the layer's own mask and the scope's, or None where there is neither."""
        if mask is None or self.padding_mask is None:
            return self.padding_mask if mask is None else mask
        return ops.logical_and(mask, self.padding_mask)

    def append(self, name, key, value, mask):
        """Appends the keys and values of this call to the entry `name`.

        Args:
            name: str. What `call_name` gave the calling layer.
            key: tensor of shape `[B, K, T, D]`.
            value: tensor of shape `[B, K, T, E]`.
            mask: boolean tensor of shape `[B, T]`, or None where all are real.

        Returns:
            All keys, all values, and a boolean mask of shape `[B, S]` of those that are filled and real. S is
            `max_length`, or T at the first call, where nothing else is there yet.
        """
        batch, heads, length, _ = ops.shape(key)
        if name not in self.cache:
            # Around an axis of a single row XLA copies the whole cache at each step.
            rows = () if isinstance(batch, int) and batch == 1 else (batch,)
            self.cache[name] = {
                "key": ops.zeros((*rows, heads, self.max_length, key.shape[3]), key.dtype),
                "value": ops.zeros((*rows, heads, self.max_length, value.shape[3]), value.dtype),
                "mask": ops.zeros((batch, self.max_length), "bool"),
            }
        entry = self.cache[name]
        has_rows = len(entry["key"].shape) == 4
        self._check_room(length, ops.shape(entry["key"])[-2])
        real = self.real(mask)
        real = ops.ones((batch, length), "bool") if real is None else ops.broadcast_to(real, (batch, length))

        def updated(kept, new):
            return self.written(kept, new if has_rows else ops.squeeze(new, axis=0), axis=-2)

        self.cache[name] = entry = {
            "key": updated(entry["key"], key),
            "value": updated(entry["value"], value),
            "mask": self.written(entry["mask"], real, axis=-1),
        }
        if self._first:
            return key, value, real
        key, value = (x if has_rows else ops.expand_dims(x, 0) for x in (entry["key"], entry["value"]))
        return key, value, entry["mask"]

    def spread(self, mask, length):
        """A boolean `[B, T]` about the tokens of this call as one about the cache, `[B, length]`: False elsewhere."""
        return self.written(ops.zeros((ops.shape(mask)[0], length), "bool"), mask, axis=-1)

    def written(self, kept, new, axis):
        """What the cache keeps, with what is new of this call in its slots, which lie along `axis`."""
        starts = [0] * len(kept.shape)
        starts[axis] = self._place()
        return ops.slice_update(kept, starts, new)

    def once(self, name, compute):
        """The dict of tensors that `compute()` returned at the first call: what does not change from token to token."""
        if name not in self.cache:
            self.cache[name] = {key: value for key, value in compute().items() if value is not None}
        return self.cache[name]

    def padding_before(self, name, mask):
        """How many padded tokens came before each row's first real one: int32 `[B, 1]`, or None without a mask."""
        real = self.real(mask)
        before = self.cache.get(name, {}).get("padding")
        if real is None or (before is None and not (isinstance(self.index, int) and self.index == 0)):
            return before
        padding = ops.cast(self.index, "int32") + first_real(real)
        if before is not None:  # Rows that have begun keep their count.
            padding = ops.where(before == ops.cast(self.index, "int32"), padding, before)
        self.cache[name] = {"padding": padding}
        return padding

    def _place(self):
        """The slot of the cache that the first token of this call takes."""
        return self.index if self.branches is None else self.branches.place(self.index)

    def _check_room(self, length, room):
        known = all(isinstance(number, int) for number in (self.index, length, room))
        if known and self.index + length > room:
            raise ValueError(
                f"The cache has room for max_length={room} tokens; received {length} tokens at index={self.index}, "
                f"which needs {self.index + length}."
            )


def grown(cache, length):
    """A cache that a `DecodingScope` left, with room for `length` tokens, no fewer than before."""

    def larger(key, x):
        axis = -1 if key == "mask" else -2
        shape = list(ops.shape(x))
        shape[axis] = length
        return ops.slice_update(ops.zeros(shape, x.dtype), [0] * len(shape), x)

    return {
        name: {key: larger(key, x) for key, x in entry.items()} if "key" in entry else entry
        for name, entry in cache.items()
    }


class Branches:
    """What a row may go on with, several tokens at one position, each of which continues another sequence.

    The cache keeps the prompt once, and behind it the tokens of all branches side by side, step by step: nothing moves
    when branches are dropped and others split, which only changes what each of them sees.

    Args:
        start: int or scalar int tensor. How many tokens came before there were branches, padding included.
        origins: int tensor `[B, W, N]`: which of the `W` tokens of each step a branch has in it. Its own token is the
            one of its own number.
        count: scalar int tensor. Steps so far, this one included.
    """

    def __init__(self, start, origins, count):
        self.start = start
        self.origins = origins
        self.count = count

    def place(self, index):
        """The slot of the cache that the first token at the position `index` takes."""
        return self.start + self.origins.shape[1] * (index - self.start)

    def positions(self, places):
        """Positions of the tokens in these slots."""
        later = self.start + (places - self.start) // self.origins.shape[1]
        return ops.where(places < self.start, places, later)

    def visible(self, length):
        """Which slots of the cache each branch has in it: boolean `[B, W, length]`."""
        batch, width, steps = ops.shape(self.origins)
        own = ops.equal(ops.expand_dims(self.origins, -1), ops.arange(width, dtype="int32"))  # [B, W, N, W]
        known = ops.reshape(ops.arange(steps, dtype="int32") < self.count, (1, 1, steps, 1))
        own = ops.reshape(ops.logical_and(own, known), (batch, width, steps * width))
        prompt = ops.ones((batch, width, self.start), "bool")
        beyond = ops.zeros((batch, width, length), "bool")
        return ops.concatenate([prompt, own, beyond], axis=-1)[:, :, :length]


class RecordingScope(Scope):
    """Keeps the intermediates that layers name as they make them.

    Under the scope attention takes the plain kernel, which holds the weights; the results are the same. From a layer's
    second call on its path is followed by `@1`, `@2`, ...

    Args:
        names: the names to keep, such as `["weights"]`; all by default.

    Attributes:
        records: dict from `<layer path>/<name>` to tensor, in the order of computation.
        origins: dict from path to `(layer, name, sources)`: who made it, under which name, and from what. A source is
            the path of an earlier record, or what has none: a tensor, a number, or None for what had no part in it.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> layer = kt.layers.MultiHeadSelfAttention(2, name="attention")
    >>> with kt.scopes.RecordingScope(["scores", "weights"]) as scope:
    ...     output = layer(np.ones((1, 3, 8), "float32"))
    >>> [(path, tuple(value.shape)) for path, value in scope.records.items()]
    [('attention/scores', (1, 2, 3, 3)), ('attention/weights', (1, 2, 3, 3))]
    """

    _current = _recording

    def __init__(self, names=None):
        super().__init__()
        self.names = None if names is None else frozenset(names)
        self.records = {}
        self.origins = {}
        self._paths = {}  # From the id of a tensor, which the records keep alive, to its path.
        self._renamed = []

    def record(self, layer, name, value, sources=()):
        """Keeps `value`, which `layer` made from `sources`. A tensor that has a path already keeps it."""
        if (self.names is not None and name not in self.names) or id(value) in self._paths:
            return
        path = self._path(layer, name)
        self.origins[path] = (layer, name, tuple(self._paths.get(id(source), source) for source in sources))
        self.records[path] = value
        self._paths[id(value)] = path

    @contextlib.contextmanager
    def renamed(self, layer, path):
        """Calls `layer`, and what is inside it, by another path than its own while the context lasts."""
        self._renamed.append((_own_path(layer), path))
        calls, self._calls = self._calls, {}
        try:
            yield
        finally:
            self._calls = calls
            self._renamed.pop()

    def _path(self, layer, name):
        path = _own_path(layer)
        if self._renamed:
            own, given = self._renamed[-1]
            if path == own or path.startswith(own + "/"):
                path = given + path[len(own) :]
        count = self._calls.get(path, 0)
        if f"{numbered(path, count)}/{name}" in self.records:  # A name that comes again begins another call.
            self._calls[path] = count = count + 1
        return f"{numbered(path, count)}/{name}"


def numbered(path, count):
    """The path of a call that `count` others by the same path came before."""
    return f"{path}@{count}" if count else path


def _own_path(layer):
    return getattr(layer, "path", None) or layer.name  # Operations that are no layers have no path.


def decoding():
    """The current `DecodingScope`, or None."""
    return _decoding.scope


def recording():
    """The current `RecordingScope`, or None."""
    return _recording.scope


def products():
    """The products of the current `DecodingScope`, or None."""
    scope = _decoding.scope
    return None if scope is None else scope.products


def record(layer, name, value, *sources):
    """Names what `layer` has made from `sources`, if a `RecordingScope` is open; returns it, which may be None."""
    scope = _recording.scope
    if scope is not None and value is not None:
        scope.record(layer, name, value, sources)
    return value
