"""The command line of the load tests: what is wrong is told in one line, before anything runs."""

import sys

import pytest
import yaml

from load_tests.__main__ import main

SCENARIO = {"trace": {"input": "S", "output": "S"}, "requests": 3, "rates": [2.0]}


@pytest.fixture
def load_tests(monkeypatch, capsys):
    """Runs the program; its exit status and what it says."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["load_tests", *map(str, arguments)])
        return main(), capsys.readouterr().err

    return run


def test_a_report_needs_results(load_tests, tmp_path):
    nowhere = tmp_path / "nowhere"
    status, error = load_tests("report", "--results", nowhere)
    assert (status, error) == (
        1,
        f"{nowhere} has no results; `run` and `simulate` write them\n",
    )


@pytest.mark.parametrize("command", ["simulate", "run", "bound"])
def test_a_trace_that_cannot_be_read_is_told_at_once(load_tests, tmp_path, command):
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(SCENARIO))
    missing = {"file": str(tmp_path / "missing.csv"), "format": "burstgpt"}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**SCENARIO, "trace": missing}))
    results = tmp_path / "results"
    status, error = load_tests(
        command, tmp_path / "good.yaml", tmp_path / "bad.yaml", "--results", results
    )
    assert status == 1
    assert "missing.csv" in error
    assert error.count("\n") == 1
    assert not results.exists()


def test_the_bound_knows_no_policies(load_tests, capsys):
    with pytest.raises(SystemExit):
        load_tests("bound", "m-m", "--policies", "llumnix")
    assert "--policies" in capsys.readouterr().err


def test_runs_at_a_time_are_one_at_least(load_tests, capsys):
    with pytest.raises(SystemExit):
        load_tests("simulate", "m-m", "--jobs", "0")
    assert "--jobs: at least 1" in capsys.readouterr().err
