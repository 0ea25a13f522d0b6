import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from app import wait


class Server(BaseHTTPRequestHandler):
    """An OpenAI endpoint whose first completions fail."""

    failures = 2
    completions = 0
    key = None

    def do_GET(self):
        expected = self.key and f"Bearer {self.key}"
        known = self.headers["Authorization"] == expected
        self.reply({"data": [{"id": "tiny"}]}, 200 if known else 401)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        Server.completions += 1
        self.reply({}, 503 if Server.completions <= self.failures else 200)

    def reply(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def port():
    Server.completions = 0
    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_it_waits_for_answers_in_a_row_and_says_what_to_try(tmp_path, port, capsys):
    file = tmp_path / "fleet.yaml"
    file.write_text(
        f"http_options: {{host: 0.0.0.0, port: {port}}}\napplications: [{{route_prefix: /}}]\n"
    )
    assert wait.main(str(file)) == 0
    assert Server.completions == Server.failures + wait.STREAK
    said = capsys.readouterr().out
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in said
    assert '"model": "tiny"' in said


def test_it_ends_with_its_parent(monkeypatch, capsys):
    parents = iter([7, 7, 1])
    monkeypatch.setattr(wait.os, "getppid", lambda: next(parents))
    assert wait.main("http://127.0.0.1:9") == 1
    assert capsys.readouterr().out == ""


def test_it_has_the_key_that_vllm_asks_for(monkeypatch, port, capsys):
    monkeypatch.setattr(Server, "key", "sk-all")
    monkeypatch.setenv("VLLM_API_KEY", "sk-all")
    assert wait.main(f"http://127.0.0.1:{port}") == 0
    assert "ready" in capsys.readouterr().out
