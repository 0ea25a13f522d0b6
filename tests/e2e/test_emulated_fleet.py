"""Emulated engines behind real Serve: load tests run on them, and their tokens move exactly."""

from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI

from load_tests import fleet_run
from load_tests.results import to_json
from load_tests.scenario import Scenario
from load_tests.servers import Server
from tests.e2e.fleet import Fleet, Stream

pytestmark = pytest.mark.e2e

SCENARIO = Scenario.model_validate(
    {
        "name": "tiny",
        "trace": {"input": "S", "output": "S"},
        "requests": 40,
        "rates": [8.0],
        "instances": 2,
        "high_priority": 0.2,
    }
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with fleet_run.start(SCENARIO, "llumnix", tmp_path_factory.mktemp("log")) as server:
        yield server


async def test_a_load_test_tells_of_each_request_what_became_of_it(emulated: Server):
    ended: list[None] = []
    playing = fleet_run.play(emulated, SCENARIO, "llumnix", lambda: ended.append(None))
    (run,) = [run async for run in playing]
    result = to_json(run)
    assert len(ended) == result["completed"] == SCENARIO.requests
    assert result["errors"] == [""] * SCENARIO.requests
    wanted = [request.output_tokens for request in SCENARIO.trace_at(8.0)]
    assert result["output_lens"] == wanted
    assert result["p50_ttft_ms"] > 0
    assert set(result["priorities"]) == {"high", "normal"}
    assert len(run.samples[-1].loads) == SCENARIO.instances
    assert all(one.queue_s >= 0 for one in run.served)
    assert run.facts["worst_drift"] >= 0


async def test_tokens_computed_from_kv_blocks_are_the_same_after_a_move(emulated: Server):
    stream = Stream("Whatever it is that is asked here", 150, "stays", model="emulated")
    url = f"{emulated.url}/v1"
    async with (
        Fleet(emulated.url) as fleet,
        AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as openai,
    ):
        unmoved = await stream.run(openai)
        moved = stream.again("moves")
        await moved.run(openai, at=40, then=lambda: fleet.migrate("moves"))
        told = await fleet.request("moves")
    assert [move["outcome"] for move in told["migrations"]] == ["completed"]
    assert told["migrations"][0]["recomputed_tokens"] == 0
    assert moved.result() == unmoved.result()
