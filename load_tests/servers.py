"""Servers to measure: a fleet as `make serve` starts it, and plain vLLM beside it.

with fleet(config, {"replicas": 1}, {}, log) as ours, plain_vllm(config, log) as other:
    asyncio.run(closed_loop(ours.url, ...))
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

PROJECT = Path(__file__).parents[1]
READY_S = 180.0
STOP_S = 60.0
"""Serve drains first; what still runs after this is killed."""

SMALL_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 48 << 20,  # 383 blocks
    "max_model_len": 4096,
    "max_num_seqs": 32,
    # No prefill is chunked: with a seeded request that kills plain vLLM on CPU (seeded_prefill.py).
    "max_num_batched_tokens": 8192,
}
"""Engine arguments for the tiny model, where several engines share a machine."""

# One thread for the model in both: Ray gives an actor of one CPU as many, and vLLM would otherwise
# pin its own to cores that the front end uses as well.
PLAIN_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class ServerFailed(RuntimeError):
    """A fleet ended, was not ready in time, or gave no answer; one line says what."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `pid` is the root of all its processes."""

    name: str
    url: str
    pid: int


@contextmanager
def fleet(
    config: Path,
    overrides: Mapping[str, Any],
    make_variables: Mapping[str, str],
    log: Path,
) -> Iterator[Server]:
    """`make serve` on free ports, with the YAML file's `args` changed as given."""
    content = yaml.safe_load(config.read_text())
    content["applications"][0]["args"].update(overrides)
    with serving(content, make_variables, log) as server:
        yield server


@contextmanager
def serving(
    content: Mapping[str, Any], make_variables: Mapping[str, str], log: Path
) -> Iterator[Server]:
    """`make serve` of a YAML file with this content, but for its ports."""
    port = free_port()
    http = {"host": "127.0.0.1", "port": port}
    # Other ports than HAProxy's default ones let two fleets run at once. The last is shared without
    # an error: a fleet that is still starting would be answered for by the other one.
    uses = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    ports = {f"RAY_SERVE_{use}": str(free_port()) for use in uses}
    with yaml_file({**content, "http_options": http}) as file:
        variables = {"CONFIG": str(file), **make_variables}
        command = ["make", "serve", *(f"{name}={value}" for name, value in variables.items())]
        with _running("fleet", command, ports, port, log, signal.SIGINT) as server:
            yield server


def application(args: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a YAML file for a fleet with these `args`."""
    ours = {"name": "llama", "import_path": "app.main:build_app", "args": dict(args)}
    return {"applications": [ours]}


@contextmanager
def yaml_file(content: Mapping[str, Any]) -> Iterator[Path]:
    """A file with this content, for as long as it is needed."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(content), file)
        file.flush()
        yield Path(file.name)


@contextmanager
def plain_vllm(config: Path, log: Path) -> Iterator[Server]:
    """vLLM's own server with the model and the engine arguments of a fleet's YAML file."""
    port = free_port()
    model = yaml.safe_load(config.read_text())["applications"][0]["args"]["model"]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--model", model["model_source"], "--served-model-name", model["model_id"]),
        "--disable-uvicorn-access-log",
        *engine_flags(model.get("engine_kwargs", {})),
    ]
    with _running("vllm", command, PLAIN_ENV, port, log, signal.SIGTERM) as server:
        yield server


def engine_flags(arguments: Mapping[str, Any]) -> list[str]:
    """vLLM's engine arguments as its command line has them."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def free_port() -> int:
    """A TCP port that nothing listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _running(
    name: str,
    command: list[str],
    environment: Mapping[str, str],
    port: int,
    log: Path,
    end: signal.Signals,
) -> Iterator[Server]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        server = Server(name, f"http://127.0.0.1:{port}", process.pid)
        try:
            _wait_ready(process, server, log)
            yield server
        finally:
            _stop(process, end)


def heed_signals() -> None:
    """Let SIGTERM end this program as Ctrl-C does, so that it stops its servers.

    A shell's background job ignores SIGINT, and so would all of its children.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def _heed_interrupts() -> None:
    """In the new process, before it becomes the server."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _wait_ready(process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not _answers(f"{server.url}/v1/models"):
        if process.poll() is not None:
            raise ServerFailed(f"{server.name} ended with {process.returncode}: see {log}")
        if time.monotonic() > deadline:
            raise ServerFailed(f"{server.name} is not ready after {READY_S:.0f} s: see {log}")
        time.sleep(0.3)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _stop(process: subprocess.Popen[bytes], end: signal.Signals) -> None:
    """As Ctrl-C in a terminal does, to the whole group; then kill what is left, by pid."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, end)
    deadline = time.monotonic() + STOP_S
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, max(1.0, min(10.0, deadline - time.monotonic())))
    for left in alive:
        left.kill()
    process.wait()
