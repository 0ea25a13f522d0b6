"""The source's half of the protocol: one attempt to move one request, as a state machine.

At every instant exactly one instance owns the request, and until COMMIT is acknowledged that is
the source, with the request's blocks intact (design.md §4). Whatever fails before, it goes on
there as if nothing had happened. After Llumnix (OSDI'24) §4.2, with an answer to each way to fail.

`Source.on(event)` answers the one action to do next; the event is what became of it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from migration.protocol.messages import Refused, Reserved
from migration.protocol.timing import SETTLE_TRIES
from migration.snapshot import Snapshot

Outcome = Literal["completed", "refused", "aborted"]

PREEMPTED = "it was preempted at the source, and lost the blocks that were copied"


class State(Enum):
    """What the source waits for."""

    CONNECTING = "the link to the destination"
    INSPECTING = "the request's state at a step boundary, before anything was asked"
    RESERVING = "the destination's answer to PRE-ALLOC"
    COPYING = "full blocks on their way, while the request decodes"
    CHECKING = "the request's state at a step boundary, between two stages"
    EXTENDING = "the destination's answer to a later PRE-ALLOC"
    PARKING = "the request to leave the batch at a step boundary"
    COMMITTING = "the destination's answer to COMMIT"
    SETTLING = "what became of a COMMIT that was not answered"
    UNPARKING = "the request to go on here"
    CANCELLING = "the destination to give its blocks back"
    RELEASING = "the request's blocks to be freed here: it is the destination's now"
    FORWARDING = "the destination to hear that the client went away"
    ENDED = "nothing"


# --- what to do -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Join the pair group, if there is none yet."""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Look at the request between two steps."""


@dataclass(frozen=True, slots=True)
class AskReserve:
    """PRE-ALLOC for `tokens` tokens of KV."""

    snapshot: Snapshot
    tokens: int


@dataclass(frozen=True, slots=True)
class AskExtend:
    """PRE-ALLOC of a later stage."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Send `count` blocks from the request's block `first` on, beside the running steps."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Park:
    """Take the request out of the batch; its blocks stay."""


@dataclass(frozen=True, slots=True)
class SendCommit:
    """Send the last blocks, from `first` on, and COMMIT with them."""

    snapshot: Snapshot
    first: int


@dataclass(frozen=True, slots=True)
class Settle:
    """Ask the destination, by a cancel, whether it committed."""


@dataclass(frozen=True, slots=True)
class Unpark:
    """Put the request back, whether it was parked or not."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell the destination, as far as it listens, to give its blocks back."""


@dataclass(frozen=True, slots=True)
class Release:
    """Free the request here."""


@dataclass(frozen=True, slots=True)
class ForwardAbort:
    """Drop the request on both sides: its client is gone."""


@dataclass(frozen=True, slots=True)
class End:
    """All is done."""

    outcome: Outcome
    detail: str = ""


Action = (
    Connect | Inspect | AskReserve | AskExtend | Copy | Park | SendCommit | Settle | Unpark | Cancel
    | Release | ForwardAbort | End
)  # fmt: skip


# --- what became of it ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """Connected, copied, unparked, cancelled, released, forwarded."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """It runs or waits, and may compute `growth` more tokens before it is looked at again."""

    snapshot: Snapshot
    growth: int


@dataclass(frozen=True, slots=True)
class Parked:
    """It is out of the batch, as it stands in `snapshot`."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Committed:
    """The destination owns it."""


@dataclass(frozen=True, slots=True)
class Silence:
    """No answer to COMMIT, or to the question what became of it."""


@dataclass(frozen=True, slots=True)
class Failed:
    """It did not work, and why. After COMMIT: the destination will never commit this move."""

    reason: str


Event = Done | Inspected | Reserved | Refused | Parked | Committed | Silence | Failed


class Source:
    """The machine. `client_gone` is set from outside, before any event."""

    def __init__(self, block_size: int, max_stages: int) -> None:
        self.state = State.CONNECTING
        self.stages = 0
        self.client_gone = False
        self.recomputed_tokens = 0
        self._block_size = block_size
        self._max_stages = max_stages
        self._copied = 0
        self._capacity = 0
        self._computed = 0
        self._preemptions = 0
        self._commit_sent = False
        self._settled = 0
        self._outcome: Outcome = "aborted"
        self._detail = ""

    @property
    def committing(self) -> bool:
        """COMMIT may have reached the destination: an abort must follow the request there."""
        return self.state in (State.COMMITTING, State.SETTLING, State.RELEASING)

    def start(self) -> Action:
        """The first thing to do."""
        return Connect()

    def on(self, event: Event) -> Action:
        """What follows from `event`. Raises ValueError for one that cannot happen here."""
        match self.state, event:
            case State.CONNECTING, Done():
                return self._to(State.INSPECTING, Inspect())
            case State.INSPECTING, Inspected(snapshot, growth):
                return self._reserve(snapshot, growth)
            case State.CHECKING, Inspected(snapshot, growth):
                return self._check(snapshot, growth)
            case State.RESERVING | State.EXTENDING, Reserved():
                return self._granted(event)
            case State.RESERVING, Refused(reason):
                return self._end("refused", reason)
            case State.EXTENDING, Refused(reason):
                return self._give_up(reason, "refused")
            case State.COPYING, Done():
                return self._to(State.CHECKING, Inspect())
            case State.PARKING, Parked(snapshot):
                return self._parked(snapshot)
            case State.COMMITTING | State.SETTLING, Committed():
                return self._to(State.RELEASING, Release())
            case State.COMMITTING | State.SETTLING, Silence():
                return self._settle()
            case State.UNPARKING, Done() | Failed():
                return self._to(State.CANCELLING, Cancel())
            case State.RELEASING, Done() | Failed():
                self._outcome = "completed"
                return self._forward_or_end()
            case State.CANCELLING, Done() | Failed():
                return self._forward_or_end()
            case State.FORWARDING, Done() | Failed():
                return self._end(self._outcome, self._detail)
            case state, Failed(reason) if state is not State.ENDED:
                return self._failed(reason)
        raise ValueError(f"{event} while waiting for {self.state.value}")

    def _reserve(self, snapshot: Snapshot, growth: int) -> Action:
        self._preemptions = snapshot.preemptions
        snapshot = self._as_sent(snapshot)
        self._computed = snapshot.computed_tokens
        tokens = self._computed + growth if self._max_stages else 0
        return self._to(State.RESERVING, AskReserve(snapshot, tokens))

    def _granted(self, answer: Reserved) -> Action:
        if self.state is State.RESERVING:
            self._copied = answer.cached_blocks
        self._capacity = answer.capacity
        return self._next_stage()

    def _check(self, snapshot: Snapshot, growth: int) -> Action:
        if snapshot.preemptions != self._preemptions:
            return self._give_up(PREEMPTED)
        self._computed = snapshot.computed_tokens
        wanted = self._computed + growth
        if wanted - self._capacity > growth // 2:
            return self._to(State.EXTENDING, AskExtend(wanted))
        return self._next_stage()

    def _next_stage(self) -> Action:
        """Copy what is full by now, or suspend the request for the block that it is filling."""
        full = self._computed // self._block_size
        left = full - self._copied
        if not left or self.stages + 1 >= self._max_stages:
            return self._to(State.PARKING, Park())
        copy = Copy(self._copied, left)
        self._copied, self.stages = full, self.stages + 1
        return self._to(State.COPYING, copy)

    def _parked(self, snapshot: Snapshot) -> Action:
        if self.client_gone:
            return self._go_on("its client went away")
        if snapshot.preemptions != self._preemptions:
            return self._go_on(PREEMPTED)
        self.recomputed_tokens = snapshot.computed_tokens
        snapshot = self._as_sent(snapshot)
        self.recomputed_tokens -= snapshot.computed_tokens
        if snapshot.computed_tokens > self._capacity:
            return self._go_on("it outgrew the blocks reserved for it")
        if snapshot.computed_tokens > self._copied * self._block_size:
            self.stages += 1
        self._commit_sent = True
        return self._to(State.COMMITTING, SendCommit(snapshot, self._copied))

    def _as_sent(self, snapshot: Snapshot) -> Snapshot:
        """Without its KV, where moves are to make no copy at all."""
        return snapshot if self._max_stages else snapshot.without_kv()

    def _settle(self) -> Action:
        """COMMIT is not answered. A cancel fences it, and its answer says which came first.

        A destination that stays silent is taken for dead. Should it have committed after all, the
        ingress drops its duplicate tokens, and it drops the request that nobody asks it for.
        """
        if self._settled == SETTLE_TRIES:
            return self._go_on("the destination does not answer")
        self._settled += 1
        return self._to(State.SETTLING, Settle())

    def _failed(self, reason: str) -> Action:
        if self.state in (State.CONNECTING, State.INSPECTING):
            return self._end("aborted", reason)
        if self.state in (State.PARKING, State.COMMITTING, State.SETTLING):
            return self._go_on(reason)
        return self._give_up(reason)

    def _go_on(self, reason: str) -> Action:
        """It may be parked: first of all it runs again, then the destination is told."""
        self._detail = reason
        return self._to(State.UNPARKING, Unpark())

    def _give_up(self, reason: str, outcome: Outcome = "aborted") -> Action:
        self._outcome, self._detail = outcome, reason
        return self._to(State.CANCELLING, Cancel())

    def _forward_or_end(self) -> Action:
        if self.client_gone and self._commit_sent:
            return self._to(State.FORWARDING, ForwardAbort())
        return self._end(self._outcome, self._detail)

    def _end(self, outcome: Outcome, detail: str) -> Action:
        return self._to(State.ENDED, End(outcome, detail))

    def _to(self, state: State, action: Action) -> Action:
        self.state = state
        return action
