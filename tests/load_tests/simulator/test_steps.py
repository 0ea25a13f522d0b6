"""The simulated step thread: a step takes its time, and all that is told or done waits for it."""

import asyncio
from typing import Any

import pytest

from load_tests.simulator.steps import BLOCKED_S, VirtualSteps
from tests.virtual import virtually

STEP_S = 0.1


class Engine:
    """An EngineCore with so many steps to go; `seen` is what happened, and when."""

    def __init__(self, steps: int = 0, blocked: int = 0) -> None:
        self.scheduler = self
        self.left, self.blocked = steps, blocked
        self.made = 0
        self.seen: list[tuple[float, str]] = []
        self.steps = VirtualSteps(self, self.note_published)

    def has_requests(self) -> bool:
        return self.left > 0

    def step_fn(self) -> tuple[Any, bool]:
        if self.blocked:
            self.blocked -= 1
            return None, False
        self.left -= 1
        self.made += 1
        self.steps.step(STEP_S, follows=True)
        return {0: f"step {self.made}"}, True

    def post_step(self, executed: bool) -> None:
        pass

    def give(self, steps: int) -> None:
        """A command: work arrives."""
        self.left += steps

    def note_published(self, outputs: Any) -> None:
        self.note(outputs[0])

    def note(self, what: str) -> str:
        at = asyncio.get_running_loop().time()
        self.seen.append((pytest.approx(at), what))  # type: ignore[arg-type]
        return what


@virtually
async def test_a_step_is_told_at_its_end() -> None:
    engine = Engine()
    await engine.steps.run(lambda: engine.give(2))
    await asyncio.sleep(1)
    assert engine.seen == [(STEP_S, "step 1"), (2 * STEP_S, "step 2")]


@virtually
async def test_an_idle_engine_runs_a_command_at_once() -> None:
    engine = Engine()
    await asyncio.sleep(3)
    assert await engine.steps.run(lambda: engine.note("command")) == "command"
    assert engine.seen == [(3, "command")]


@virtually
async def test_commands_wait_for_the_end_of_the_step_in_their_order() -> None:
    engine = Engine()
    await engine.steps.run(lambda: engine.give(2))
    await asyncio.sleep(STEP_S / 2)
    first = engine.steps.run(lambda: engine.note("first"))
    second = engine.steps.run(lambda: engine.note("second"))
    await asyncio.gather(first, second)
    assert engine.seen == [(STEP_S, "step 1"), (STEP_S, "first"), (STEP_S, "second")]


@virtually
async def test_a_command_s_failure_is_its_caller_s_alone() -> None:
    engine = Engine()
    await engine.steps.run(lambda: engine.give(2))
    with pytest.raises(ZeroDivisionError):
        await engine.steps.run(lambda: 1 // 0)
    await asyncio.sleep(1)
    assert engine.seen[-1] == (2 * STEP_S, "step 2")


@virtually
async def test_a_command_that_nobody_waits_for_any_more_is_not_run() -> None:
    engine = Engine()
    await engine.steps.run(lambda: engine.give(1))
    await asyncio.sleep(STEP_S / 2)
    engine.steps.call(lambda: engine.note("too late")).cancel()
    await asyncio.sleep(1)
    assert engine.seen == [(STEP_S, "step 1")]


@virtually
async def test_a_step_that_ran_nothing_is_tried_again_soon() -> None:
    engine = Engine(blocked=3)
    await engine.steps.run(lambda: engine.give(1))
    await asyncio.sleep(1)
    assert engine.seen == [(3 * BLOCKED_S + STEP_S, "step 1")]
