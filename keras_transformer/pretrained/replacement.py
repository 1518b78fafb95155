"""Several files of a directory replaced together: all of them or, after an exception, none."""

import contextlib
import os
import secrets


class Replacement:
    """New files that take the place of old ones together, once the `with` block has ended without an exception.

    New files have temporary names until then. At the end the old files step aside, the new ones take their names, and
    the old ones are deleted; an exception, at whatever point before the deletion, takes all of this back. The file
    named by `last` steps aside first and is put back last: a process killed in between leaves a directory without it.

    Args:
        directory: `pathlib.Path` of the directory, which must exist.
        last: String. The name of the file without which the directory is visibly incomplete.

    Example:

    >>> import os, pathlib
    >>> os.makedirs("settings")
    >>> with Replacement(pathlib.Path("settings"), last="config.json") as replacement:
    ...     with replacement.create("config.json") as file:
    ...         size = file.write(b"{}")
    ...     with replacement.create("notes.txt") as file:
    ...         size = file.write(b"none")
    >>> sorted(os.listdir("settings"))
    ['config.json', 'notes.txt']
    """

    def __init__(self, directory, last):
        self.directory = directory
        self.last = last
        self.token = secrets.token_hex(4)
        self.created = {}
        self.removed = []

    @contextlib.contextmanager
    def create(self, name):
        """A new file open for writing, which is to be called `name`."""
        path = self._temporary(f"new-{name}")
        self.created[name] = path
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # A name must not outlive, in a loss of power, the bytes it stands for.

    def remove(self, names):
        """Says which of the old files are to go even if no new one takes their place."""
        self.removed.extend(names)

    def _temporary(self, purpose):
        return self.directory / f".{purpose}.{self.token}.partial"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self._replace()
        finally:
            for path in self.created.values():
                path.unlink(missing_ok=True)

    def _replace(self):
        replaced = [name for name in self.created if os.path.lexists(self.directory / name)]
        old = sorted({*replaced, *self.removed}, key=lambda name: name != self.last)
        new = sorted(self.created, key=lambda name: name == self.last)
        aside = {name: self._temporary(f"old-{name}") for name in old}
        moves = [(self.directory / name, aside[name]) for name in old]
        moves += [(self.created[name], self.directory / name) for name in new]
        done = []
        try:
            for source, target in moves:
                source.replace(target)
                done.append((source, target))
        except BaseException:
            for source, target in reversed(done):
                target.replace(source)
            raise
        for path in aside.values():
            with contextlib.suppress(OSError):  # The new files stand: one that cannot be deleted no longer matters.
                path.unlink()
