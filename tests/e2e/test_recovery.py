"""An instance dies or hangs, and its clients see a pause: whatever they asked for goes on."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai import AsyncOpenAI

from load_tests.chaos.processes import Processes
from load_tests.servers import Server, fleet
from tests.e2e.conftest import all_up, write_config
from tests.e2e.fleet import Fleet, Stream

pytestmark = pytest.mark.e2e

LONG = 300
"""Output tokens; a few seconds where eight requests run at once."""

SEEDED = {"temperature": 1.0, "seed": 7, "top_p": 0.95}
PENALTIES = {"presence_penalty": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.2}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": SEEDED,
    "penalties": {**SEEDED, **PENALTIES},
    "logprobs": {"temperature": 0, "logprobs": 2},
    "regex": {**SEEDED, "structured_outputs": {"regex": "([a-z]{5}-[0-9]{5} ){40}"}},
    "children": {**SEEDED, "n": 3},
    "least": {"temperature": 0, "min_tokens": 200, "stop_token_ids": list(range(97, 117))},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two instances that lose requests now and then, and move none by themselves."""
    folder = tmp_path_factory.mktemp("recovery")
    config = write_config(folder, "tests.e2e.stuck:build_app")
    overrides = {"migration": {"enabled": False}}
    with fleet(config, overrides, make_variables={}, log=folder / "fleet.log") as running:
        yield running


@pytest.fixture
async def running(server: Server) -> AsyncIterator[Fleet]:
    """Both instances are up at the beginning, and nothing is left on them at the end."""
    await all_up(server.url)
    async with Fleet(server.url) as api:
        yield api
        await api.until_empty()


@dataclass
class Answer:
    """What a client got, by the index of the sequence."""

    text: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict, compare=False)
    finish: dict[int, str] = field(default_factory=dict)
    usage: Any = None

    def add(self, choice: Any) -> None:
        at = choice.index
        self.text[at] = self.text.get(at, "") + choice.text
        self.token_ids.setdefault(at, []).extend(choice.token_ids or [])
        if choice.logprobs is not None:
            self.logprobs.setdefault(at, []).extend(choice.logprobs.token_logprobs)
        if choice.finish_reason:
            self.finish[at] = choice.finish_reason


async def ask(
    openai: AsyncOpenAI, name: str, kind: dict[str, Any], begun: Callable[[], None] = lambda: None
) -> Answer:
    """Stream one completion; `begun` is called once some tokens are there."""
    answer, chunks = Answer(), 0
    stream = await openai.completions.create(
        model="tiny-llama",
        prompt="this is what I want to know",
        max_tokens=LONG,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, **kind},
        extra_headers={"x-request-id": name},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            answer.add(choice)
        answer.usage = chunk.usage or answer.usage
        chunks += 1
        if chunks == 20:
            begun()
    return answer


class Crowd:
    """One request of each kind, all of them on the same instance."""

    def __init__(self, openai: AsyncOpenAI, api: Fleet, name: str, kinds: dict[str, Any]) -> None:
        self._openai, self._api, self._name, self._kinds = openai, api, name, kinds
        self._begun = dict.fromkeys(kinds, False)
        self._all_begun = asyncio.Event()

    async def run(self, then: Callable[[str], Awaitable[Any]] | None = None) -> dict[str, Answer]:
        """Their answers; once all have begun, `then(instance)` is awaited beside them."""
        here, other = await self._api.replicas()
        await self._api.post("/fleet/drain", {"replica_id": other})
        async with asyncio.TaskGroup() as tasks:
            running = {
                kind: tasks.create_task(
                    ask(self._openai, f"{self._name}-{kind}", params, lambda k=kind: self._on(k))
                )
                for kind, params in self._kinds.items()
            }
            await self._all_begun.wait()
            await self._api.post("/fleet/undrain", {"replica_id": other})
            if then is not None:
                await then(here)
        return {kind: task.result() for kind, task in running.items()}

    def _on(self, kind: str) -> None:
        self._begun[kind] = True
        if all(self._begun.values()):
            self._all_begun.set()


async def test_whatever_runs_on_an_instance_that_is_killed_goes_on_elsewhere(
    server: Server, running: Fleet, openai: AsyncOpenAI
) -> None:
    undisturbed = await Crowd(openai, running, "calm", KINDS).run()
    stop = undisturbed["greedy"].text[0][200:204]
    kinds = {**KINDS, "stop": {"temperature": 0, "stop": [stop]}}
    processes = Processes(server.pid).instances()

    async def kill(instance: str) -> None:
        processes[instance].kill()

    survived = await Crowd(openai, running, "killed", kinds).run(kill)
    stopped = survived.pop("stop")

    for kind, answer in survived.items():
        assert answer == undisturbed[kind], kind
        # In a batch with others the last bits differ.
        logprobs = undisturbed[kind].logprobs.items()
        assert answer.logprobs == {at: pytest.approx(each, abs=1e-3) for at, each in logprobs}
    assert stopped.finish == {0: "stop"}
    recovered = await running.request("killed-greedy")
    assert recovered["recoveries"] == 1
    assert len(set(recovered["replicas"])) == 2
    assert (await running.overview())["recoveries"] >= len(kinds)


async def test_a_process_that_stands_still_is_not_waited_for_and_not_heard_any_more(
    server: Server, running: Fleet, openai: AsyncOpenAI
) -> None:
    kinds = {kind: KINDS[kind] for kind in ("greedy", "seeded")}
    undisturbed = await Crowd(openai, running, "calm", kinds).run()
    processes = Processes(server.pid).instances()
    stopped: list[str] = []

    async def stop(instance: str) -> None:
        stopped.append(instance)
        processes[instance].send_signal(signal.SIGSTOP)

    survived = await Crowd(openai, running, "stopped", kinds).run(stop)
    fresh = await ask(openai, "fresh-greedy", kinds["greedy"])
    processes[stopped[0]].send_signal(signal.SIGCONT)

    assert survived == undisturbed
    assert fresh == undisturbed["greedy"]
    assert (await running.request("fresh-greedy"))["replicas"] != stopped


async def test_an_engine_that_hangs_loses_its_requests_though_its_process_answers(
    running: Fleet, openai: AsyncOpenAI
) -> None:
    undisturbed = await Stream("hanging on", LONG, "fine").run(openai)

    async def move() -> None:
        await running.migrate("stuck")

    survivor = await Stream("hanging on", LONG, "stuck").run(openai, 50, move)

    assert survivor.result() == undisturbed.result()
    assert (await running.request("stuck"))["recoveries"] == 1
