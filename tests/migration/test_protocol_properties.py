"""A move under everything that can happen to it: messages, copies, engines and clients fail.

Each example is one run of two instances in virtual time (`tests.migration.sim.world`); the real
Llumlet, MigrateOut, MigrateIn and Links carry the moves out. Pinned down: never two owners and
never none, every token right and none missing, no block or reservation left behind, no request
that stands still for ever.
"""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

from app.config import MigrationConfig
from deployments.llumlet import Llumlet
from migration.destination import MigrateIn
from migration.peer import PeerLost
from migration.protocol.source import Source
from migration.snapshot import CannotMove
from migration.source import MigrateOut
from tests.migration.sim.engine import SimEngine
from tests.migration.sim.scenario import Event, Fault, Request, Scenario
from tests.migration.sim.transport import CopyFault, Wires
from tests.migration.sim.world import play

ORDINARY = settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
"""tests/chaos/test_protocol_thousands.py runs more."""

MESSAGES = ("connect", "reserve", "extend", "receive", "commit", "commit", "cancel", "abort")
FATES = ("lost", "unreachable", "late", "answer lost", "answer lost", "cut", "twice")
POINTS = (*MESSAGES, None, "parked", "installed")
DELAYS = (0.01, 0.0, 0.03, 0.01, 0.1, 0.4)
LATE = (0.05, 0.4, 1.5, 3.0, 4.5, 8.0)
SECONDS = (0.0, 0.02, 0.1, 0.3, 0.7, 1.5, 3.0, 4.1)
SOON = (0.0, 0.1, 0.25, 0.4, 0.8, 1.5, 2.2)
INSTANCES = st.sampled_from("AB")


def sampled(*values):
    return st.sampled_from(values)


def tuples_of(strategy, most: int, least: int = 0):
    return st.lists(strategy, min_size=least, max_size=most).map(tuple)


def move(number: int, after: float) -> Event:
    return Event("move", after, f"r{number}", number)


requests = st.builds(
    Request,
    sampled(0.0, 0.0, 0.1, 0.3),
    sampled("A", "A", "B"),
    st.integers(2, 24),
    sampled(60, 60, 60, 40, 40, 25, 5),
)
moves = st.builds(move, sampled(0, 0, 1, 2), sampled(*SOON))
troubles = st.builds(
    Event,
    sampled("preempt", "preempt", "abort", "hang"),
    sampled(*SECONDS),
    sampled(*POINTS),
    st.integers(0, 3),
    INSTANCES,
    sampled(0.3, 2.0, 6.0, 15.0),
)
deaths = st.builds(
    Event, st.just("die"), sampled(*SECONDS), sampled(*POINTS), st.just(0), INSTANCES
)
events = st.tuples(
    tuples_of(moves, 3, least=1),
    tuples_of(troubles, 3),
    st.one_of(st.just(()), st.just(()), st.just(()), tuples_of(deaths, 1, least=1)),
).map(lambda parts: parts[0] + parts[1] + parts[2])
faults = st.builds(Fault, sampled(*MESSAGES), st.integers(0, 2), sampled(*FATES), sampled(*LATE))
copies = st.builds(
    CopyFault, st.integers(0, 3), st.integers(0, 3), sampled("break", "hang", "slow")
)
scenarios = st.builds(
    Scenario,
    requests=tuples_of(requests, 4, least=1),
    events=events,
    faults=tuples_of(faults, 4),
    copies=tuples_of(copies, 2),
    delays=tuples_of(sampled(*DELAYS), 3, least=1),
    blocks=st.tuples(sampled(40, 24, 21), sampled(40, 24, 21)),
    step_s=sampled(0.05, 0.01, 0.2),
    block_s=sampled(0.02, 0.001, 0.1, 0.4),
    answer_s=sampled(0.0, 0.04),
    token_s=sampled(0.0, 0.5),
    grammar_s=sampled(0.0, 0.0, 0.0, 0.0, 0.2, 7.0),
    depth=sampled(1, 2),
    max_stages=sampled(8, 2, 1, 0),
    keep_free=sampled(0.0, 1.0),
    cancels_travel=st.booleans(),
    leaving_breaks=st.booleans(),
    silent_death=st.booleans(),
    timeout_s=sampled(4.0, 10.0),
)


def check(scenario: Scenario) -> None:
    """The property."""
    problems = play(scenario).problems
    assert not problems, "\n".join(problems)


@settings(ORDINARY)
@given(scenarios)
def test_whatever_happens_one_instance_owns_the_request_and_its_tokens_are_right(scenario):
    check(scenario)


def test_a_destination_keeps_what_it_committed_until_the_source_has_asked():
    """With the default settings: COMMIT's answer and the first question after it are lost."""
    scenario = Scenario(
        requests=(Request(0.0, "A", 6, 60),),
        events=(move(0, 0.2),),
        faults=(Fault("commit", 0, "answer lost", 0.0), Fault("cancel", 0, "lost", 0.0)),
        step_s=0.6,
        timeout_s=MigrationConfig().timeout_s,
    )
    check(scenario)


def test_a_destination_keeps_what_it_committed_while_the_source_makes_a_long_step():
    """The source answers "moved" only after its present step: a long prefill, say."""
    long_step = Event("hang", 0.0, "installed", where="A", seconds=12.0)
    scenario = Scenario((Request(0.0, "A", 6, 60),), (move(0, 0.2), long_step), step_s=0.3)
    check(scenario)


def transport_that_writes_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Wires, "writes", False)


def source_that_sees_no_preemption(patch: pytest.MonkeyPatch) -> None:
    standing = SimEngine._standing

    def unchanged(engine, request):
        seen = standing(engine, request)
        return replace(seen, snapshot=replace(seen.snapshot, preemptions=0))

    patch.setattr(SimEngine, "_standing", unchanged)


def source_that_goes_on_without_asking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Source, "_settle", lambda machine: machine._go_on("no answer"))


def source_that_takes_an_error_for_a_no(patch: pytest.MonkeyPatch) -> None:
    perform = MigrateOut._perform

    async def sure(out, action, attempt):
        try:
            return await perform(out, action, attempt)
        except PeerLost as error:
            raise CannotMove(str(error)) from error

    patch.setattr(MigrateOut, "_perform", sure)


def destination_that_does_not_wait_for_copies(patch: pytest.MonkeyPatch) -> None:
    end = MigrateIn._end

    async def hasty(incoming, move, *, committed):
        move.stages.clear()
        await end(incoming, move, committed=committed)

    patch.setattr(MigrateIn, "_end", hasty)


def destination_without_leases(patch: pytest.MonkeyPatch) -> None:
    async def never(incoming):
        pass

    patch.setattr(MigrateIn, "expire", never)


def llumlet_that_never_looks_for_orphans(patch: pytest.MonkeyPatch) -> None:
    async def leases_only(self):
        await self.incoming.expire()

    patch.setattr(Llumlet, "housekeeping", leases_only)


def with_fault(message: str, fate: str, seconds: float):
    """Runs in which the first such message has this fate: what a control needs, more often."""
    fault = Fault(message, 0, fate, seconds)
    return scenarios.map(lambda run: replace(run, faults=(fault, *run.faults[:2])))


lost_answers = with_fault("commit", "answer lost", 0.0)
cut_commits = with_fault("commit", "cut", 0.4)
cut_copies = with_fault("receive", "cut", 0.05)


@pytest.mark.parametrize(
    ("fault", "among", "symptom"),
    [
        (transport_that_writes_nothing, scenarios, "is wrong"),
        (source_that_sees_no_preemption, scenarios, "is wrong"),
        (source_that_goes_on_without_asking, lost_answers, "has two owners"),
        (source_that_takes_an_error_for_a_no, cut_commits, "has two owners"),
        (destination_that_does_not_wait_for_copies, cut_copies, "not reserved (any more)"),
        (destination_without_leases, scenarios, "not at rest"),
        (llumlet_that_never_looks_for_orphans, scenarios, "not at rest"),
    ],
)
def test_the_property_finds_a_fleet_with_a(fault, among, symptom, monkeypatch):
    fault(monkeypatch)

    def shows(scenario: Scenario) -> bool:
        return any(symptom in problem for problem in play(scenario).problems)

    find(among, shows, settings=settings(ORDINARY, max_examples=20_000, phases=[Phase.generate]))
