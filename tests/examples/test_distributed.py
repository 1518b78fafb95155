"""The script that starts the translation run in several processes: what it is told, and what it does when one fails.

What the processes compute together is held by `tests/test_processes.py`.
"""

import sys

import distributed
import pytest


@pytest.fixture
def arguments(monkeypatch):
    for name in distributed.RANKS:
        monkeypatch.delenv(name, raising=False)

    def parse(*given):
        monkeypatch.setattr(sys, "argv", ["distributed.py", *given])
        return distributed.parse_arguments()[1]

    return parse


def test_help(arguments, capsys):
    with pytest.raises(SystemExit):
        arguments("--help")
    printed = capsys.readouterr().out
    for option in (
        "--engine",
        "--processes",
        "--hosts",
        "--rank",
        "--model-parallel",
        "--data",
        "--epochs",
        "--output",
    ):
        assert option in printed


def test_the_rank_comes_from_what_starts_the_processes(arguments, monkeypatch):
    hosts = ["--hosts", "a", "b"]
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert arguments(*hosts).rank == 1
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert arguments(*hosts).rank == 0
    assert arguments(*hosts, "--rank", "1").rank == 1
    assert arguments().rank == arguments("--hosts", "a").rank == 0


def test_addresses():
    assert distributed.addresses(["a", "b:9", "a", "b"]) == ["a:12355", "b:9", "a:12356", "b:12355"]


BAD_INPUT = {
    "model parallel": (["--engine", "tf", "--model-parallel", "2"], "needs --engine jax; received --engine tf"),
    "no rank": (["--hosts", "a", "b"], "--rank must be 0 to 1, the place of this process in --hosts; got None"),
    "rank": (["--hosts", "a", "b", "--rank", "2"], "--rank must be 0 to 1"),
    "both": (["--hosts", "a", "b", "--processes", "2", "--rank", "0"], "give one"),
    "no processes": (["--processes", "0"], "must be at least 1"),
    "no pairs": (["--pairs", "0"], "must be at least 1"),
    "unknown engine": (["--engine", "mxnet"], "invalid choice: 'mxnet'"),
}


@pytest.mark.parametrize("given, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments, capsys, given, message):
    with pytest.raises(SystemExit):
        arguments(*given)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("body, status", [("pass", 0), ("if rank == '1': sys.exit(3)\ntime.sleep(60)", 1)])
def test_one_failure_ends_all_processes(tmp_path, monkeypatch, body, status):
    script = tmp_path / "run.py"
    script.write_text(f"import sys, time, pathlib\nrank = sys.argv[-1]\npathlib.Path(rank).touch()\n{body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(distributed, "PATIENCE", 0.5)
    assert distributed.start_processes(2) == status
    assert {path.name for path in tmp_path.iterdir()} == {"run.py", "0", "1"}
