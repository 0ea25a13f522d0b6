"""What a process is called in tables and by the chaos tests."""

from types import SimpleNamespace

import pytest

from load_tests.cpu import title


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["ray::ServeReplica:llama:Ingress "], "ray::ServeReplica:llama:Ingress"),
        (["/usr/bin/python3", "-u", "/tmp/script.py", "-x"], "script.py"),
        (["python", "-m", "load_tests.chaos"], "load_tests.chaos"),
        (["python", "-c", "pass"], "python"),
        (["python"], "python"),
        (["/usr/sbin/haproxy -f x"], "haproxy"),
        ([], "zombie"),
    ],
)
def test_a_process_is_called_by_what_it_runs(words: list[str], name: str):
    process = SimpleNamespace(cmdline=lambda: words, name=lambda: "zombie")
    assert title(process) == name  # type: ignore[arg-type]
