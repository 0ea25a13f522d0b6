"""The step thread, on a core that a test steps by hand."""

import threading
from types import SimpleNamespace

import pytest

from deployments.engine_loop import EngineDead, EngineLoop

WAIT_S = 5


class Core:
    """Has work while `work` says so; each step waits for a permit if `gated`."""

    def __init__(self) -> None:
        self.batch_queue = None
        self.scheduler = SimpleNamespace(has_requests=lambda: self.work > 0)
        self.work = 0
        self.steps = 0
        self.thread: int | None = None
        self.stepping = threading.Event()
        self.permits = threading.Semaphore(0)
        self.gated = False
        self.error: BaseException | None = None
        self.executed: list[bool] = []

    def step_fn(self):
        self.thread = threading.get_ident()
        self.stepping.set()
        if self.gated:
            assert self.permits.acquire(timeout=WAIT_S)
        if self.error is not None:
            raise self.error
        self.steps += 1
        self.work -= 1
        return {0: f"outputs of step {self.steps}"}, True

    def post_step(self, executed):
        self.executed.append(executed)


class Running:
    """A loop over such a core, with what it published and how it died."""

    def __init__(self) -> None:
        self.core = Core()
        self.published = []
        self.deaths = []
        self.died = threading.Event()
        self.loop = EngineLoop(self.core, self.published.append, self._on_death)
        self.loop.start()

    def give(self, work: int) -> None:
        self.loop.call(lambda: setattr(self.core, "work", work)).result(WAIT_S)

    def step_begun(self, work: int = 1) -> None:
        """Give it work, and return in the middle of the first step."""
        self.core.gated = True
        self.give(work)
        assert self.core.stepping.wait(WAIT_S)

    def _on_death(self, error: BaseException) -> None:
        self.deaths.append(error)
        self.died.set()


@pytest.fixture
def engine():
    running = Running()
    yield running
    running.core.gated = False
    running.core.permits.release(1000)
    running.loop.stop()


def wait_idle(engine: Running) -> None:
    """All steps are done: while there is work, no command waits long enough to be last."""
    while engine.loop.call(lambda: engine.core.work).result(WAIT_S) > 0:
        pass


def test_a_command_answers_from_the_step_thread(engine):
    assert engine.loop.call(threading.get_ident).result(WAIT_S) == engine.loop._thread.ident


async def test_coroutines_await_commands(engine):
    assert await engine.loop.run(lambda: 42) == 42


def test_commands_run_in_the_order_asked_in(engine):
    order = []
    for number in range(5):
        last = engine.loop.call(lambda number=number: order.append(number))
    last.result(WAIT_S)
    assert order == [0, 1, 2, 3, 4]


def test_it_steps_while_there_is_work_and_publishes_every_step(engine):
    engine.give(3)
    wait_idle(engine)
    assert engine.core.steps == 3
    assert engine.published == [{0: f"outputs of step {n}"} for n in (1, 2, 3)]
    assert engine.core.executed == [True, True, True]


def test_it_does_not_step_while_idle(engine):
    for _ in range(10):
        engine.loop.call(lambda: None).result(WAIT_S)
    assert engine.core.steps == 0


def test_it_steps_again_when_new_work_comes(engine):
    for _ in range(2):
        engine.give(1)
        wait_idle(engine)
    assert engine.core.steps == 2


def test_batches_in_flight_are_work(engine):
    def begin():
        engine.core.batch_queue = ["in flight"]

    def publish(outputs):
        engine.core.batch_queue = None
        published.set()

    published = threading.Event()
    engine.loop._publish = publish
    engine.loop.call(begin)
    assert published.wait(WAIT_S)


def test_a_command_waits_for_the_present_step_and_runs_before_the_next(engine):
    engine.step_begun(work=2)
    command = engine.loop.call(lambda: engine.core.steps)
    assert not command.done()
    engine.core.permits.release()
    assert command.result(WAIT_S) == 1


def test_a_command_s_exception_reaches_only_its_caller(engine):
    failing = engine.loop.call(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(WAIT_S)
    assert engine.loop.call(lambda: 42).result(WAIT_S) == 42
    assert engine.loop.dead is None


def test_a_cancelled_command_does_not_run(engine):
    ran = []
    engine.step_begun()
    assert engine.loop.call(lambda: ran.append("cancelled")).cancel()
    engine.core.permits.release()
    engine.loop.call(lambda: ran.append("next")).result(WAIT_S)
    assert ran == ["next"]


def test_a_step_s_duration_is_told_and_none_between_steps(engine):
    assert engine.loop.stuck_for(1e9) == 0
    engine.step_begun()
    assert engine.loop.stuck_for(engine.loop._busy_since + 70) == pytest.approx(70)
    engine.core.permits.release()
    wait_idle(engine)
    assert engine.loop.stuck_for(1e9) == 0


def test_a_command_that_takes_long_counts_as_a_step_does(engine):
    begun, may_end = threading.Event(), threading.Event()

    def copy():
        begun.set()
        assert may_end.wait(WAIT_S)

    command = engine.loop.call(copy)
    assert begun.wait(WAIT_S)
    assert engine.loop.stuck_for(engine.loop._busy_since + 70) == pytest.approx(70)
    may_end.set()
    command.result(WAIT_S)
    assert engine.loop.stuck_for(1e9) == 0


def test_a_failed_step_is_told_once_and_kills_the_engine(engine):
    engine.core.error = RuntimeError("CUDA error")
    engine.loop.call(lambda: setattr(engine.core, "work", 1))
    assert engine.died.wait(WAIT_S)
    engine.loop._thread.join(WAIT_S)
    assert engine.deaths == [engine.core.error]
    assert engine.loop.dead is engine.core.error


def test_a_dead_engine_fails_queued_and_later_commands(engine):
    engine.core.error = RuntimeError("CUDA error")
    engine.step_begun()
    queued = [engine.loop.call(lambda: 42) for _ in range(2)]
    engine.core.permits.release()
    for command in queued:
        with pytest.raises(EngineDead, match="CUDA error"):
            command.result(WAIT_S)
    with pytest.raises(EngineDead, match="CUDA error"):
        engine.loop.call(lambda: 42).result(WAIT_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_fails_what_was_queued_behind_a_cancelled_command(engine):
    engine.core.error = RuntimeError("CUDA error")
    engine.step_begun()
    assert engine.loop.call(lambda: 42).cancel()
    queued = engine.loop.call(lambda: 42)
    engine.core.permits.release()
    engine.loop._thread.join(WAIT_S)
    assert queued.done()
    with pytest.raises(EngineDead):
        queued.result(0)


def test_stop_ends_the_thread_after_the_present_step(engine):
    engine.step_begun(work=100)
    engine.core.gated = False
    engine.core.permits.release()
    engine.loop.stop()
    assert not engine.loop._thread.is_alive()
    assert engine.deaths == []
    assert engine.core.steps < 100 or engine.core.work == 0
    with pytest.raises(EngineDead):
        engine.loop.call(lambda: 42).result(WAIT_S)


def test_commands_behind_a_stop_fail(engine):
    engine.step_begun()
    engine.loop._commands.put(None)
    late = engine.loop.call(lambda: 42)
    engine.core.permits.release()
    with pytest.raises(EngineDead):
        late.result(WAIT_S)


def test_an_idle_loop_stops_at_once(engine):
    engine.loop.stop()
    assert engine.core.steps == 0
