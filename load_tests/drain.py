"""`python -m load_tests.drain`: scale-in and a rolling update of a fleet under load.

Four emulated instances serve a steady stream of requests, first undisturbed. Then two of them are
taken away; then, with four again, every process is replaced. The same requests must give the same
tokens. With migration each instance empties itself in about the time that its KV blocks take over
the link; the control has none, and waits for its longest request. Writes drain.json and .md into
the results folder.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from deployments.emulated.profile import load_profile
from load_tests import drain_report
from load_tests.baselines import merge
from load_tests.client import Completion, Record, connect, open_loop
from load_tests.drain_report import Phase
from load_tests.fleet_api import FleetApi
from load_tests.servers import (
    PROJECT,
    Server,
    ServerFailed,
    application,
    heed_signals,
    serving,
    yaml_file,
)
from load_tests.traces.trace import prompt_ids

PROFILE, MODEL = "a10-llama-7b", "emulated"
INPUT_TOKENS, OUTPUT_TOKENS = (64, 512), (200, 800)
INSTANCES = 4
ARGS = {
    "model": {
        "model_id": MODEL,
        "model_source": "models/tiny-llama",
        "engine_kwargs": {"enable_prefix_caching": False},  # a move brings all of its blocks
    },
    "engine": {"emulated": {"profile": PROFILE}},
    "replicas": INSTANCES,
}

LOUD = {"RAY_DEDUP_LOGS": "0"}
"""Ray would show the first only of lines that are alike."""

BEGIN_S = 10.0
"""When the load is what it will be."""

DEPLOY_S, SETTLE_S = 60.0, 300.0


@dataclass(frozen=True, slots=True)
class Event:
    """A new configuration: `args` that change, which replaces every process, and how many
    instances there are then.
    """

    name: str
    instances: int
    args: Mapping[str, Any]


EVENTS = (
    Event("scale-in", 2, {}),
    Event("rolling update", INSTANCES, {"migration": {"min_gain": 1.5}}),
)


def config(args: Mapping[str, Any], instances: int) -> dict[str, Any]:
    """A Serve YAML file's content. Serve keeps all processes where only `instances` differ."""
    content = application(args)
    content["applications"][0]["deployments"] = [{"name": "LLMReplica", "num_replicas": instances}]
    return content


def requests(rate: float, seconds: float) -> list[tuple[float, Completion]]:
    """Those of so many seconds, each with its time; the first ones are always the same."""
    return [(number / rate, _completion(number)) for number in range(int(rate * seconds))]


def _completion(number: int) -> Completion:
    rng = random.Random(number)
    extra = {"prompt": prompt_ids(number, rng.randint(*INPUT_TOKENS)), "return_token_ids": True}
    return Completion(MODEL, "", rng.randint(*OUTPUT_TOKENS), extra=extra)


class Fleet(FleetApi):
    """A running fleet: what it says of itself, and new configurations for it."""

    def __init__(self, session: aiohttp.ClientSession, server: Server, log: Path) -> None:
        super().__init__(session, server.url)
        self._log = log

    def log(self) -> str:
        """All that its processes have said so far."""
        return self._log.read_text(errors="replace")

    async def deploy(self, content: Mapping[str, Any]) -> None:
        """`serve deploy`, as a user would. Raises ServerFailed."""
        http = {"host": "127.0.0.1", "port": int(self.url.rpartition(":")[2])}
        with yaml_file({"http_options": http, **content}) as file:
            process = await asyncio.create_subprocess_exec(
                *(str(Path(sys.executable).parent / "serve"), "deploy", str(file)),
                *("--address", drain_report.dashboard(self.log())),
                cwd=PROJECT,
                env={"RAY_AUTH_MODE": "token", **os.environ},  # what `serve run` does by itself
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                async with asyncio.timeout(DEPLOY_S):
                    said, _ = await process.communicate()
            except TimeoutError:
                raise ServerFailed(f"serve deploy took more than {DEPLOY_S:.0f} s") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if process.returncode:
            raise ServerFailed(f"serve deploy failed: {said.decode(errors='replace')[-500:]}")


def main() -> int:
    options = _options()
    heed_signals()
    undisturbed: list[Record] = []
    ways: dict[str, list[Phase]] = {}
    try:
        for way, enabled in (("migration", True), ("control", False)):
            args = merge(ARGS, {"migration": {"enabled": enabled}})
            ways[way] = _run(args, undisturbed, options.out / f"drain-{way}.log", options)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(drain_report.write(ways, undisturbed, load_profile(PROFILE), options.out))
    return 0


def _run(
    args: Mapping[str, Any], undisturbed: list[Record], log: Path, options: argparse.Namespace
) -> list[Phase]:
    """One fleet, from its start to its end. The first one serves the requests undisturbed, too."""
    print(f"==> starting {INSTANCES} instances, migration {args['migration']}", flush=True)

    async def measure_it(server: Server) -> list[Phase]:
        async with connect() as session:
            return await measure(Fleet(session, server, log), args, undisturbed, options)

    with serving(config(args, INSTANCES), LOUD, log) as server:
        return uvloop.run(measure_it(server))


async def measure(
    running: Fleet, args: Mapping[str, Any], undisturbed: list[Record], options: argparse.Namespace
) -> list[Phase]:
    """All events of one fleet."""
    phases: list[Phase] = []
    for event in EVENTS:
        there = await running.until_running(INSTANCES, SETTLE_S)
        if not undisturbed:
            print("==> undisturbed", flush=True)
            arrivals = requests(options.rate, max(options.seconds))
            undisturbed += await open_loop(running.session, running.url, arrivals)
            if errors := [record.error for record in undisturbed if record.error]:
                raise ServerFailed(f"undisturbed, {len(errors)} requests failed: {errors[0]}")
        print(f"==> {event.name}", flush=True)
        said = len(running.log())
        happening = asyncio.create_task(_happen(running, event, args, there))
        arrivals = requests(options.rate, options.seconds[len(phases)])
        records = await open_loop(running.session, running.url, arrivals)
        done_s = await happening
        drains = drain_report.drains(running.log()[said:])
        phases.append(Phase.of(event.name, done_s, drains, records, undisturbed))
        print(drain_report.progress(phases[-1]), flush=True)
        if event.instances != INSTANCES:
            await running.deploy(config(args, INSTANCES))
    return phases


async def _happen(
    running: Fleet, event: Event, args: Mapping[str, Any], there: Collection[str]
) -> float:
    """Deploy it in the middle of the load; the seconds until the fleet is what it asks for."""
    await asyncio.sleep(BEGIN_S)
    began = time.perf_counter()
    await running.deploy(config(merge(args, event.args), event.instances))
    await running.until_running(event.instances, SETTLE_S, there if event.args else ())
    return time.perf_counter() - began


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.drain", description=__doc__)
    parser.add_argument("--rate", type=float, default=1.2, help="requests/s")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=[60, 180], help="of load for each of the events"
    )
    parser.add_argument("--out", type=Path, default=PROJECT / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
