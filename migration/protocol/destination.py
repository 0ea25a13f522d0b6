"""The destination's half of the protocol: one request on its way in, as a table of transitions."""

from enum import Enum

from migration.snapshot import CannotMove


class State(Enum):
    """What a move is to the instance that it goes to."""

    RESERVING = "its blocks are being allocated"
    HELD = "its blocks are held, and filled stage by stage"
    TAKING_OVER = "COMMIT came: its last blocks are on their way"
    INSTALLING = "its bytes are in place: the engine takes it at the next step boundary"
    COMMITTED = "it is owned here"
    GIVEN_UP = "it will never be owned here; its blocks go back once no copy writes to them"


class Event(Enum):
    """What happens to it: messages of the source (upper half), and what the instance did."""

    STAGE = "a PRE-ALLOC or the blocks of a later stage"
    COMMIT = "COMMIT"
    CANCEL = "a cancel, or the end of its lease"
    GRANTED = "its blocks are allocated"
    REFUSED = "there is no room for it"
    FILLED = "the last bytes are in place"
    INSTALLED = "the engine has taken it"
    FAILED = "the last bytes did not come, or the engine did not take it"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.RESERVING, Event.GRANTED): State.HELD,
    (State.RESERVING, Event.REFUSED): State.GIVEN_UP,
    (State.RESERVING, Event.CANCEL): State.GIVEN_UP,
    (State.HELD, Event.STAGE): State.HELD,
    (State.HELD, Event.COMMIT): State.TAKING_OVER,
    (State.HELD, Event.CANCEL): State.GIVEN_UP,
    (State.TAKING_OVER, Event.FILLED): State.INSTALLING,
    (State.TAKING_OVER, Event.FAILED): State.GIVEN_UP,
    (State.TAKING_OVER, Event.CANCEL): State.GIVEN_UP,
    # Nothing stops an installation that has begun: a cancel waits for its end.
    (State.INSTALLING, Event.INSTALLED): State.COMMITTED,
    (State.INSTALLING, Event.FAILED): State.GIVEN_UP,
}


def after(state: State, event: Event) -> State:
    """The next state. Raises CannotMove where the event has no place (any more)."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise CannotMove(f"the destination cannot take {event.value} now: {state.value}")
    return following
