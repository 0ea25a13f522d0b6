"""What the llumlet reads off its engine: the load, and which request could leave."""

from collections.abc import Callable, Iterator, Mapping

from vllm.v1.request import Request

from deployments.policy.load import InstanceLoad, freeness, headroom_of, virtual_usage
from deployments.policy.pairing import Target
from deployments.policy.selection import Movable, choose_request
from migration.engine_seam import SLACK_TOKENS, EngineSeam
from migration.ownership import Owned
from migration.snapshot import CannotMove

WORTH_MOVING_TOKENS = 16
"""A running request this near its end stays: it would finish sooner than the move pays."""


class Survey:
    """Looks at the engine as it stands at a step boundary: used on the step thread alone.

    `owned`: the llumlet's requests, by id. `headroom_tokens`: of each class of requests.
    """

    def __init__(
        self, replica_id: str, seam: EngineSeam, headroom_tokens: Mapping[str, int]
    ) -> None:
        self._replica_id = replica_id
        self._seam = seam
        self._headroom_blocks = {c: seam.blocks_for(n) for c, n in headroom_tokens.items()}
        self.emulation_drift: Callable[[], float] = float
        """None, where the accelerator is real."""

    def load(self, owned: Mapping[str, Owned], draining: bool) -> InstanceLoad:
        """The load, but for the moves under way."""
        seam = self._seam
        running, waiting = seam.counts()
        free, total = seam.blocks_free, seam.blocks_total
        head = seam.head_of_line()
        head_blocks = self._lacking(head)
        classes, due_blocks = self._classes_and_due(owned)
        headroom = headroom_of(classes, self._headroom_blocks)
        usage = virtual_usage(
            blocks_used=total - free,
            blocks_free=free,
            head_of_line_blocks=head_blocks,
            batch_is_full=running >= seam.max_batch,
            headroom_blocks=sum(headroom.values()),
            draining=draining,
        )
        return InstanceLoad(
            replica_id=self._replica_id,
            state="draining" if draining else "running",
            blocks_total=total,
            blocks_used=total - free,
            block_size=seam.block_size,
            running=running,
            waiting=waiting,
            head_of_line_blocks=head_blocks,
            head_of_line_since=head.arrival_time if head is not None else 0.0,
            head_of_line_priority=head.priority if head is not None else 0,
            freeness=freeness(total, usage, running, waiting),
            emulation_drift=self.emulation_drift(),
            due_blocks=due_blocks,
            headroom_blocks=headroom,
            staying=sum(name in headroom for name in classes),
        )

    def choose(self, owned: Mapping[str, Owned], draining: bool, target: Target) -> str | None:
        """The request to hand over, if one is for this target."""
        growth = len(self._seam.running())  # a block for each, or one of them is preempted soon
        wanted = max(self._lacking(self._seam.head_of_line()), growth)
        movable = list(self._movable(owned, draining))
        deficit = wanted - self._seam.blocks_free
        return choose_request(movable, target.room, deficit, target.before)

    def _classes_and_due(self, owned: Mapping[str, Owned]) -> tuple[list[str], int]:
        """Of all requests here, running or not: their classes, and the blocks that they lack."""
        classes, due = [], 0
        for request_id, request in self._seam.requests().items():
            due += self._lacking(request)
            if known := owned.get(request_id):
                classes.append(known.submission.priority_class)
        return classes, due

    def _lacking(self, request: Request | None) -> int:
        """Blocks that it needs for the tokens it has, beside what it holds: one that waits may have
        moved here and hold nearly all. 0 where there is none.
        """
        if request is None:
            return 0
        held = self._seam.blocks_for(request.num_computed_tokens)
        return self._seam.blocks_for(request.num_tokens) - held

    def _movable(self, owned: Mapping[str, Owned], draining: bool) -> Iterator[Movable]:
        """The requests that a move would serve; those that wait in the order of their queue."""
        for request in (*self._seam.waiting(), *self._seam.running()):
            known = owned.get(request.request_id)
            if known is None or known.migrating or known.outcome.done():
                continue
            try:
                self._seam.check_movable(request.request_id)
            except CannotMove:
                continue
            frees = self._seam.blocks_for(request.num_computed_tokens)
            remaining = request.max_tokens - request.num_output_tokens
            if not frees or remaining >= WORTH_MOVING_TOKENS or draining:
                headroom = self._headroom_blocks.get(known.submission.priority_class)
                yield Movable(
                    request_id=request.request_id,
                    priority=request.priority,
                    tokens=request.num_tokens,
                    blocks=self._seam.blocks_for(request.num_tokens + SLACK_TOKENS),
                    frees=frees,
                    arrived=request.arrival_time,
                    stays=bool(headroom) and not draining,
                )
