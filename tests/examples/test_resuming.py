"""What the examples that train have in common: stopped in the middle, the same command ends as if it had not been."""

import sys

import numpy as np
import pytest
import text_classification

import keras_transformer as kt


class Stopped(BaseException):
    pass


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Runs the example until its model is trained, or until it begins its so many-th backup; returns its `Resume`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, backups=None):
        monkeypatch.setattr(sys, "argv", ["text_classification.py", *arguments])
        write, found = kt.training.Resume._write, []

        def count(self, values):
            found.append(self)
            if len(found) == backups:
                raise Stopped
            write(self, values)

        def trained(*_):
            raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(kt.training.Resume, "_write", count)
            patch.setattr(kt.pipelines, "Classifier", trained)
            with pytest.raises(Stopped):
                text_classification.main()
        return found[-1]

    return run


TEXTS = [
    f"{label}\tthe {n} {label} {animal} play" for n in range(8) for label, animal in (("good", "dogs"), ("bad", "cats"))
]


def test_the_same_command_goes_on(train, tmp_path):
    (tmp_path / "texts.tsv").write_text("\n".join(["label\ttext", *TEXTS]))
    command = ["--data", "texts.tsv", "--recipe", "best", "--epochs", "2", "--output"]
    whole = train(*command, "whole").history
    train(*command, "parts", backups=2)
    assert [path.name for path in (tmp_path / "parts" / "backup").glob("epoch-*")] == ["epoch-00001-batch-000000000"]
    resume = train(*command, "parts")
    assert resume.epoch == 1 and whole.keys() == resume.history.keys() and len(resume.history["loss"]) == 2
    for name, values in whole.items():
        np.testing.assert_allclose(resume.history[name], values, rtol=1e-4, err_msg=name)
