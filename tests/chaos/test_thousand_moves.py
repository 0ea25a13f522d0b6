"""A thousand random moves among three instances under load: no token is wrong, nothing leaks."""

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml
from openai import AsyncOpenAI

from load_tests.cpu import title
from load_tests.servers import Server, fleet
from tests.e2e.conftest import write_config
from tests.e2e.fleet import Fleet, Stream, a_prompt

pytestmark = pytest.mark.e2e

MOVES = 1000
WARM_MOVES = 500
"""Memory is first looked at after so many: by then links, buffers and caches are there, and malloc
has its arenas for all threads."""

INSTANCES = 3
REQUESTS = 40
STREAMS_AT_ONCE = 12
MOVERS = 4
PROGRESS_EVERY = 100

GROWTH = 0.10
GROWTH_MIB = 60
"""Memory may grow by the larger of the two: by one or the other malloc's own habits do."""

DEADLINE_S = 1800.0
STREAM_TIMEOUT_S = 90.0
ENOUGH_PROBLEMS = 20

# No move but ours; and three instances must fit on a machine of two cores.
OVERRIDES = {"replicas": INSTANCES, "migration": {"enabled": False, "max_concurrent": 2}}
DEPLOYMENTS = [{"name": "LLMReplica", "ray_actor_options": {"num_cpus": 0.5}}]


@contextmanager
def start(folder: Path, import_path: str = "app.main:build_app") -> Iterator[Server]:
    """Three instances that move nothing by themselves."""
    config = write_config(folder, import_path)
    content = yaml.safe_load(config.read_text())
    content["applications"][0]["deployments"] = DEPLOYMENTS
    config.write_text(yaml.safe_dump(content))
    log = folder / "fleet.log"
    print(f"\n==> starting {INSTANCES} instances, log: {log}", flush=True)
    with fleet(config, OVERRIDES, make_variables={}, log=log) as server:
        yield server


def requests(rng: random.Random, count: int) -> list[Stream]:
    """Prompts of 10 to 1,500 tokens, a third with a shared beginning; a third is seeded."""
    shared = a_prompt(rng, 600)
    streams = []
    for number in range(count):
        length = rng.choice([10, 40, 150, 400, 900, 1500])
        prompt = a_prompt(rng, length)
        if rng.random() < 1 / 3:
            prompt = (shared[: length // 2] + prompt)[:length]
        seeded = {"temperature": 1.0, "seed": rng.randrange(1 << 30), "top_p": 0.95}
        sampling = seeded if number % 3 == 2 else {"temperature": 0}
        streams.append(Stream(prompt, rng.randint(150, 400), f"unmoved-{number}", sampling))
    return streams


async def run_unmoved(openai: AsyncOpenAI, pool: list[Stream]) -> None:
    """Run each, a few at once: what comes out is expected of all its later copies."""
    slots = asyncio.Semaphore(4)

    async def one(stream: Stream) -> None:
        async with slots:
            await stream.run(openai)

    await asyncio.gather(*(one(stream) for stream in pool))
    assert all(stream.finish_reason for stream in pool)


@dataclass
class Chaos:
    """Copies of the pool's requests, moved at random until enough moves were made."""

    api: Fleet
    openai: AsyncOpenAI
    pool: list[Stream]
    instances: list[str]
    moves: int
    pid: int
    rng: random.Random
    completed: int = 0
    copied: int = 0
    streams: int = 0
    places: dict[str, str | None] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    warm_memory: dict[int, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        """Until enough moves were made, or enough went wrong; then to the last stream's end."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(STREAMS_AT_ONCE):
                tasks.create_task(self._keep_streaming())
            for _ in range(MOVERS):
                tasks.create_task(self._keep_moving())
        self._say()

    def problems(self) -> str:
        """Some lines, for a message."""
        problems = [*self.wrong, *self.failed]
        return f"{len(problems)} of {self.streams} streams:\n" + "\n".join(problems[:10])

    def _goes_on(self) -> bool:
        return (
            self.completed < self.moves
            and len(self.wrong) + len(self.failed) < ENOUGH_PROBLEMS
            and time.monotonic() - self.began < DEADLINE_S
        )

    async def _keep_streaming(self) -> None:
        while self._goes_on():
            self.streams += 1
            expected = self.rng.choice(self.pool)
            stream = expected.again(f"chaos-{self.streams}")
            self.places[stream.request_id] = None
            try:
                await stream.run(self.openai)
            except Exception as error:  # whatever the client raises, the request failed
                self.failed.append(f"{stream.request_id}: {error!r:.200}")
                continue
            finally:
                del self.places[stream.request_id]
            if stream.result() != expected.result():
                self.wrong.append(await self._difference(stream, expected))

    async def _difference(self, stream: Stream, expected: Stream) -> str:
        got, wanted = stream.token_ids, expected.token_ids
        same = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
        where = min(len(got), len(wanted)) if same is None else same
        record = await self.api.request(stream.request_id)
        return (
            f"{stream.request_id} (as {expected.request_id}): differs from output token {where} of"
            f" {len(wanted)} on, ended by {stream.finish_reason} after {len(got)};"
            f" prompt of {len(stream.prompt)}, {stream.sampling}, was on {record.get('replicas')}"
        )

    async def _keep_moving(self) -> None:
        while self._goes_on():
            if not self.places or not await self._move(self.rng.choice(list(self.places))):
                await asyncio.sleep(0.01)

    async def _move(self, request_id: str) -> bool:
        """One attempt: to the freest instance, or to any but the one it was last seen on."""
        place = self.places[request_id]
        others = [each for each in self.instances if each != place]
        destination = self.rng.choice(others) if place and self.rng.random() < 0.5 else None
        try:
            status, answer = await self.api.migrate(request_id, destination)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.failed.append(f"the move of {request_id}: {error!r:.200}")
            return False
        if status == 200:
            self._moved(request_id, answer)
            return True
        if status in (404, 409):
            self.outcomes[self._kind(answer)] += 1
        else:
            self.failed.append(f"the move of {request_id}: {status} {answer!r:.200}")
        return False

    def _moved(self, request_id: str, record: dict[str, Any]) -> None:
        if request_id in self.places:
            self.places[request_id] = record["to"]
        self.completed += 1
        self.copied += record["blocks"] > 0
        if self.completed == WARM_MOVES:
            self.warm_memory = memory(self.pid)
        if self.completed % PROGRESS_EVERY == 0:
            self._say()

    def _kind(self, answer: dict[str, Any]) -> str:
        """The refusal's message without the names in it."""
        message = re.sub(r"\S*chaos-\S*", "R", answer["error"]["message"])
        return re.sub("|".join(map(re.escape, self.instances)), "I", message)

    def _say(self) -> None:
        seconds = time.monotonic() - self.began
        refusals = ", ".join(f"{count} x {kind}" for kind, count in self.outcomes.most_common())
        print(
            f"{self.completed:>5} moves ({self.copied} with blocks) in {seconds:.0f} s,"
            f" {self.completed / seconds:.1f}/s; {self.streams} streams, {len(self.wrong)} wrong,"
            f" {len(self.failed)} failed; MiB {list(memory(self.pid).values())};"
            f" not moved: {refusals or 'none'}",
            flush=True,
        )


def memory(pid: int) -> dict[int, int]:
    """Resident MiB of each instance's process under `pid`."""
    return {
        process.pid: process.memory_info().rss >> 20
        for process in psutil.Process(pid).children(recursive=True)
        if "ServeReplica" in (name := title(process)) and "LLMReplica" in name
    }


def quiet(overview: dict[str, Any], completed: int) -> bool:
    """All instances are up and hold nothing, and the Scheduler knows of so many moves."""
    counts = ("blocks_used", "running", "waiting", "migrating_in", "migrating_out")
    return (
        [each["state"] for each in overview["replicas"]] == ["running"] * INSTANCES
        and not any(each[count] for each in overview["replicas"] for count in counts)
        and overview["migrations"]["completed"] >= completed
    )


async def settled(api: Fleet, completed: int) -> dict[str, Any]:
    """The overview once all is quiet, or what it is instead after the deadline."""
    with contextlib.suppress(TimeoutError):
        await api.until(lambda overview: quiet(overview, completed))
    overview = await api.overview()
    overview["replicas"].sort(key=lambda each: each["replica_id"])
    return overview


async def unleash(
    server: Server, api: Fleet, pool: list[Stream], moves: int
) -> tuple[Chaos, dict[str, Any]]:
    """Run the pool unmoved, then copies of it in chaos. Also answers the overview before."""
    url = f"{server.url}/v1"
    async with AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=STREAM_TIMEOUT_S
    ) as openai:
        before = await settled(api, 0)
        await run_unmoved(openai, pool)
        before = await settled(api, 0)
        assert quiet(before, 0), before
        assert before["migrations"]["completed"] == 0
        instances = [each["replica_id"] for each in before["replicas"]]
        print(f"==> {moves} moves among {instances}", flush=True)
        chaos = Chaos(api, openai, pool, instances, moves, server.pid, random.Random(11))
        await chaos.run()
    return chaos, before


async def test_a_thousand_moves_change_no_token_and_leak_nothing(tmp_path: Path) -> None:
    pool = requests(random.Random(20261122), REQUESTS)
    with start(tmp_path) as server:
        async with Fleet(server.url) as api:
            chaos, before = await unleash(server, api, pool, MOVES)
            after = await settled(api, chaos.completed)
        now = memory(server.pid)

    assert not chaos.wrong, chaos.problems()
    assert not chaos.failed, chaos.problems()
    assert chaos.completed >= MOVES
    # What is in the destination's prefix cache is not copied; that must not hide the copying.
    assert chaos.copied > chaos.completed / 2
    assert after["replicas"] == before["replicas"]
    assert after["migrations"]["completed"] == chaos.completed
    assert len(now) == INSTANCES
    assert now.keys() == chaos.warm_memory.keys()
    grown = {pid: (was, now[pid]) for pid, was in chaos.warm_memory.items()}
    assert all(is_ - was < max(GROWTH * was, GROWTH_MIB) for was, is_ in grown.values()), grown


async def test_the_same_without_the_kv_copy_sees_wrong_tokens(tmp_path: Path) -> None:
    """The control: the test above would notice lost bytes."""
    pool = [each for each in requests(random.Random(5), REQUESTS) if len(each.prompt) > 100]
    with start(tmp_path, "tests.e2e.no_copy:build_app") as server:
        async with Fleet(server.url) as api:
            chaos, _ = await unleash(server, api, pool, moves=10)

    assert chaos.wrong
    assert not chaos.failed, chaos.problems()
