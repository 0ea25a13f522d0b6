"""The two machines of the protocol, and that docs/migration.md tells the truth about them."""

import copy
import re
from collections import deque
from itertools import product
from pathlib import Path

import pytest

from migration.protocol import destination
from migration.protocol import source as protocol
from migration.protocol.messages import Refused, Reserved
from migration.protocol.source import Source
from migration.protocol.timing import SETTLE_TRIES
from migration.snapshot import CannotMove, Snapshot, Submission

DOC = Path(__file__).parents[2] / "docs/migration.md"
BLOCK = 16

SUBMISSION = Submission("r", "r", b"", 40, "normal", "nowhere")
SNAPSHOTS = [
    Snapshot(SUBMISSION, computed_tokens=computed, preemptions=preemptions)
    for computed, preemptions in product((0, 40, 400), (0, 1))
]
EVENTS: list[protocol.Event] = [
    protocol.Done(),
    *(protocol.Inspected(snapshot, 8) for snapshot in SNAPSHOTS),
    *(protocol.Parked(snapshot) for snapshot in SNAPSHOTS),
    Reserved(64, 0),
    Reserved(480, 0),
    Reserved(480, 1),
    Refused("no"),
    protocol.Committed(),
    protocol.Silence(),
    protocol.Failed("no"),
]
Transition = tuple[str, str, str]


def all_transitions() -> set[Transition]:
    """(state, event, next state), found by trying every event wherever the machine can get to."""
    found: set[Transition] = set()
    seen: set[str] = set()
    machine = Source(BLOCK, max_stages=4)
    machine.start()
    todo = deque([machine])
    while todo:
        machine = todo.popleft()
        for event, client_gone in product(EVENTS, (False, True)):
            following = copy.copy(machine)
            following.client_gone = client_gone
            try:
                following.on(event)
            except ValueError:
                continue
            found.add((machine.state.name, type(event).__name__, following.state.name))
            if (key := repr(sorted(vars(following).items(), key=str))) not in seen:
                seen.add(key)
                todo.append(following)
    return found


def rows(heading: str) -> set[Transition]:
    """The transitions in the table under a heading: | state | event, event | next | ..."""
    _, _, section = DOC.read_text().partition(f"## {heading}\n")
    section, _, _ = section.partition("\n## ")
    found = set()
    for line in section.splitlines():
        cells = [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:4]]
        if len(cells) == 3:
            found |= set(product(*cells))
    return found


def test_the_document_has_every_transition_of_the_source_and_no_other() -> None:
    assert rows("The source's states") == all_transitions()


def test_the_document_has_every_transition_of_the_destination_and_no_other() -> None:
    in_code = {
        (state.name, event.name, following.name)
        for (state, event), following in destination.TRANSITIONS.items()
    }
    assert rows("The destination's states") == in_code


def test_the_document_names_every_state() -> None:
    text = DOC.read_text()
    for state in (*protocol.State, *destination.State):
        assert f"`{state.name}`" in text


def committing(max_stages: int = 8) -> Source:
    """A source that sent COMMIT and has no answer yet."""
    machine = Source(BLOCK, max_stages)
    machine.start()
    machine.on(protocol.Done())
    machine.on(protocol.Inspected(Snapshot(SUBMISSION, computed_tokens=10), 8))
    machine.on(Reserved(64, 0))
    machine.on(protocol.Parked(Snapshot(SUBMISSION, computed_tokens=12)))
    assert machine.state is protocol.State.COMMITTING
    return machine


def test_an_unanswered_commit_is_asked_about_and_at_last_taken_for_lost() -> None:
    machine = committing()
    asked = 0
    while isinstance(machine.on(protocol.Silence()), protocol.Settle):
        asked += 1
    assert asked == SETTLE_TRIES
    assert machine.state is protocol.State.UNPARKING


def test_an_abort_follows_the_request_only_once_commit_was_sent() -> None:
    machine = committing()
    machine.client_gone = True
    machine.on(protocol.Committed())
    assert isinstance(machine.on(protocol.Done()), protocol.ForwardAbort)


def test_what_happens_out_of_turn_is_an_error_of_ours() -> None:
    with pytest.raises(ValueError, match="Committed"):
        Source(BLOCK, 8).on(protocol.Committed())


@pytest.mark.parametrize("event", list(destination.Event))
@pytest.mark.parametrize("state", [destination.State.COMMITTED, destination.State.GIVEN_UP])
def test_nothing_changes_what_has_ended_at_the_destination(
    state: destination.State, event: destination.Event
) -> None:
    with pytest.raises(CannotMove):
        destination.after(state, event)
