"""A scenario on the real fleet: requests over HTTP, and the admin API watched meanwhile."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvloop

from deployments.policy.load import InstanceLoad
from load_tests.client import Completion, Record, connect, open_loop
from load_tests.fleet_api import FleetApi, Overview, states
from load_tests.metrics import percentile
from load_tests.outcome import REFUSED, Run, Sample, Served
from load_tests.scenario import Scenario
from load_tests.servers import Server, ServerFailed, application, serving
from load_tests.traces.trace import TraceRequest, prompt_ids
from migration.snapshot import MigrationRecord

SAMPLE_S = 0.5
HISTORY_S = 15.0
"""The fleet shows the last 1,000 requests that ended: enough for 60 requests/s."""

LAST_TRIES = 5
"""Times to ask for what came of the last requests."""

UP_S = 600.0
"""For all instances of a large fleet on a small machine."""

REQUEST_S = 1800.0
"""Longest request, in a queue that grows as long as the run."""


def run(
    scenario: Scenario,
    policy: str,
    logs: Path,
    progress: Callable[[], None],
    keep: Callable[[Run], None],
) -> None:
    """Start a fleet of the policy, and play the trace at each rate.

    `progress` is called at each request's end, `keep` at each run's. Raises ServerFailed.
    """

    async def play_all(server: Server) -> None:
        async for done in play(server, scenario, policy, progress):
            keep(done)

    with start(scenario, policy, logs) as server:
        uvloop.run(play_all(server))


@contextmanager
def start(scenario: Scenario, policy: str, logs: Path) -> Iterator[Server]:
    """The fleet of a scenario and a policy."""
    log = logs / f"{scenario.name}-{policy}.log"
    with serving(application(scenario.fleet_args(policy)), {}, log) as server:
        yield server


async def play(
    server: Server, scenario: Scenario, policy: str, progress: Callable[[], None]
) -> AsyncIterator[Run]:
    """The trace at each of the scenario's rates, once all instances to begin with are up."""
    async with connect(timeout_s=REQUEST_S) as session:
        fleet = FleetApi(session, server.url)
        config = scenario.fleet_config(policy)
        # An idle fleet that scales begins to shrink before its last instances are up.
        least = config.autoscaling.min if config.autoscaling else config.replicas
        await fleet.until(
            lambda overview: states(overview).count("running") >= least, UP_S, f"{least} instances"
        )
        for rate in scenario.rates:
            trace = scenario.trace_at(rate)
            player = Player(fleet, scenario, policy, rate)
            yield await player.play(trace, progress)


class Watch:
    """What the admin API tells while a trace is played. Times are those of time.perf_counter."""

    def __init__(self, fleet: FleetApi) -> None:
        self._fleet = fleet
        self.samples: list[tuple[float, Overview]] = []
        self.requests: dict[str, dict[str, Any]] = {}

    async def look(self) -> None:
        """Sample all loads, for ever. A fleet too busy to answer is asked again."""
        while True:
            overview = await self._fleet.overview()
            if overview["replicas"]:
                self.samples.append((time.perf_counter(), overview))
            await asyncio.sleep(SAMPLE_S)

    async def remember(self) -> None:
        """Keep what is told of requests, for ever: the fleet forgets them."""
        while True:
            await asyncio.sleep(HISTORY_S)
            with suppress(ServerFailed):
                await self.collect()

    async def collect_last(self) -> None:
        """`collect`, for a run that is not to be lost for it: asked again while nobody answers.

        Raises ServerFailed.
        """
        for _ in range(LAST_TRIES - 1):
            with suppress(ServerFailed):
                return await self.collect()
            await asyncio.sleep(SAMPLE_S)
        await self.collect()

    async def collect(self) -> None:
        """What the fleet knows of requests now. Raises ServerFailed."""
        self.requests.update({one["request_id"]: one for one in await self._fleet.requests()})


class Player:
    """One rate of one policy."""

    def __init__(
        self,
        fleet: FleetApi,
        scenario: Scenario,
        policy: str,
        rate: float,
    ) -> None:
        self._fleet = fleet
        self._scenario = scenario
        self._policy = policy
        self._rate = rate
        self._watch = Watch(fleet)

    async def play(self, trace: Sequence[TraceRequest], progress: Callable[[], None]) -> Run:
        """All requests at their times, whatever became of those before."""
        arrivals = [(one.at, self._completion(index, one)) for index, one in enumerate(trace)]
        start = time.perf_counter()
        watching = [
            asyncio.create_task(self._watch.look()),
            asyncio.create_task(self._watch.remember()),
        ]
        records = await open_loop(
            self._fleet.session, self._fleet.url, arrivals, lambda _: progress()
        )
        duration = time.perf_counter() - start
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await self._watch.collect_last()
        if not self._watch.samples:
            raise ServerFailed("the fleet never told its loads")
        return self._run(trace, records, start, duration)

    def _completion(self, index: int, request: TraceRequest) -> Completion:
        return Completion(
            model="emulated",
            prompt="",
            output_tokens=request.output_tokens,
            headers={
                "X-Request-Id": self._name(index),
                "x-llumnix-priority": request.priority,
            },
            extra={
                "prompt": prompt_ids(index, request.input_tokens, self._scenario.seed),
                "return_token_ids": True,
            },
        )

    def _name(self, index: int) -> str:
        return f"{self._rate:g}-{index:06}"

    def _run(
        self,
        trace: Sequence[TraceRequest],
        records: Sequence[Record],
        start: float,
        duration: float,
    ) -> Run:
        told = [self._watch.requests.get(self._name(index), {}) for index in range(len(trace))]
        served = [
            _served(self._name(index), one, record, start, known)
            for index, (one, record, known) in enumerate(zip(trace, records, told, strict=True))
        ]
        samples = [Sample(at - start, _loads(fleet)) for at, fleet in self._watch.samples]
        start_unix = time.time() - (time.perf_counter() - start)
        lag = [one.arrival - due.at for one, due in zip(served, trace, strict=True)]
        drift = [load.emulation_drift for load in samples[-1].loads] or [0.0]
        return Run(
            scenario=self._scenario.name,
            policy=self._policy,
            rate=self._rate,
            backend="fleet",
            instances=self._scenario.instances,
            model_id="emulated",
            duration=duration,
            served=served,
            samples=samples,
            moves=[
                move
                for one, known in zip(served, told, strict=True)
                for move in _moves(one.request_id, known, start_unix)
            ],
            facts={
                "worst_lag_ms": 1000 * max(lag),
                "worst_drift": max(drift),
                "mean_drift": statistics.fmean(drift),
                **_refusals(records),
            },
        )


def _served(
    name: str, request: TraceRequest, record: Record, start: float, told: Mapping[str, Any]
) -> Served:
    """`told`: what the admin API said of it; nothing, where it never got to an engine."""
    served = Served(
        name,
        record.started - start,
        request.input_tokens,
        request.output_tokens,
        request.priority,
        error=record.error,
    )
    served.tokens.extend(at - start for at in record.arrivals)
    if not record.error and len(record.arrivals) != request.output_tokens:
        served.error = f"{len(record.arrivals)} of {request.output_tokens} tokens"
    if told:
        served.queue_s = told["queue_ms"] / 1e3
        served.preemptions = told["preemptions"]
        served.preempted_s = told["preempted_ms"] / 1e3
        served.preempted_after_move = told["preempted_after_move"]
        served.moves = sum(move["outcome"] == "completed" for move in told["migrations"])
    return served


def _refusals(records: Sequence[Record]) -> dict[str, float]:
    """How long it took to be refused."""
    seconds = [one.ended - one.started for one in records if one.error.startswith(REFUSED)]
    return {"refusal_p99_ms": 1e3 * percentile(seconds, 99)} if seconds else {}


def _moves(
    request_id: str, told: Mapping[str, Any], start_unix: float
) -> Iterator[MigrationRecord]:
    """Their keys are the record's own, but for the two that `MigrationRecord.to_json` renames."""
    for move in told.get("migrations", ()):
        rest = {**move, "at": move["at"] - start_unix}
        yield MigrationRecord(request_id, rest.pop("from"), rest.pop("to"), **rest)


def _loads(fleet: Mapping[str, Any]) -> tuple[InstanceLoad, ...]:
    """Its keys are the load's own (`app.admin.load_to_json`); JSON has no -inf freeness."""
    return tuple(
        InstanceLoad(**one | {"freeness": -1e9 if one["freeness"] is None else one["freeness"]})
        for one in fleet["replicas"]
    )
