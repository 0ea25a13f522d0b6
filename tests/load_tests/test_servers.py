"""Starting and stopping, with a small web server in place of a real one."""

import signal
import sys

import psutil
import pytest

from load_tests import servers
from load_tests.cpu import CpuMeter, title

SERVER = """
import http.server, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def run(code, log, port):
    command = [sys.executable, "-c", code, str(port)]
    return servers._running("test", command, {}, port, log, signal.SIGINT)


def test_a_server_and_its_children_are_stopped(tmp_path):
    with run(SERVER, tmp_path / "log", servers.free_port()) as server:
        root = psutil.Process(server.pid)
        family = [root, *root.children(recursive=True)]
        assert len(family) == 2
        shares = CpuMeter(server.pid).shares()
        assert {share.pid for share in shares} == {process.pid for process in family}
        assert title(root).startswith("python")
    assert not any(process.is_running() for process in family)


def test_a_server_that_ends_at_once_is_told_with_its_log(tmp_path):
    with (
        pytest.raises(servers.ServerFailed, match=r"ended with 3: see .*log"),
        run("raise SystemExit(3)", tmp_path / "log", servers.free_port()),
    ):
        pass


def test_engine_flags():
    arguments = {"dtype": "float32", "enforce_eager": True, "a_b": False, "seed": None, "x": 3}
    flags = ["--dtype", "float32", "--enforce-eager", "--no-a-b", "--x", "3"]
    assert servers.engine_flags(arguments) == flags
