"""Runs a script of `examples/` as a user does, but in the process of the tests, which has imported what it imports."""

import contextlib
import importlib
import io
import sys
from pathlib import Path

import pytest


def load_script(name):
    """The script as a module. That `python NAME.py` would run its `main` is read in its last lines."""
    script = importlib.import_module(name)
    assert Path(script.__file__).read_text().endswith('\n\nif __name__ == "__main__":\n    main()\n')
    return script


def run_script(script, folder, *arguments, recipe=None, **changes):
    """What `main` prints in a folder. A recipe may be changed, so that a model of it is small."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        if changes:
            patch.setitem(script.RECIPES, recipe, script.RECIPES[recipe]._replace(**changes))
        script.main()
    return printed.getvalue()
