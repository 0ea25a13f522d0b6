"""Waits beside `serve run` until the fleet answers, then says how to talk to it."""

import json
import os
import time
import urllib.request
from pathlib import Path
from typing import Any

from app.check import read_yaml

STREAK = 3
"""Answers in a row that count as ready: HAProxy restarts just after it learns of the ingress, and
a request that comes in between may hang."""

READY = """
==> ready: {url}/v1 speaks OpenAI's API, {url}/fleet shows the engines. Try:

curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d \\
  '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 64}}'
"""


def main(target: str) -> int:
    """Waits for the server at a URL, or for the one that a YAML file describes.

    Ends without a word when its parent does: nobody is left to read it.
    """
    url = target.rstrip("/") if target.startswith("http") else _url(Path(target))
    parent = os.getppid()
    streak, model = 0, None
    while streak < STREAK:
        if os.getppid() != parent:
            return 1
        time.sleep(0.5)
        model = _answer(url)
        streak = streak + 1 if model else 0
    print(READY.format(url=url, model=model), flush=True)
    return 0


def _url(file: Path) -> str:
    content = read_yaml(file)
    http = content.get("http_options") or {}
    host = str(http.get("host", "127.0.0.1")).replace("0.0.0.0", "127.0.0.1")
    prefix = content["applications"][0].get("route_prefix", "/")
    return f"http://{host}:{http.get('port', 8000)}{prefix}".rstrip("/")


def _answer(url: str) -> str | None:
    """The name of a model that has just generated a token; None where none does."""
    try:
        model = str(_json(f"{url}/v1/models")["data"][0]["id"])
        _json(f"{url}/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1})
    except (OSError, ValueError):
        return None
    return model


def _json(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)
