"""What the moves that pairing leads to make of a fleet in which nothing else happens."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.policy.load import InstanceLoad, freeness, headroom_of, virtual_usage
from deployments.policy.pairing import PairingRule, Target, pair
from deployments.policy.selection import Movable, choose_request

TOTAL, HEADROOM = 100, {"urgent": 40}


@dataclass(eq=False)
class Request:
    name: str
    blocks: int
    since: float
    urgent: bool = False


@dataclass(eq=False)
class Instance:
    """Its queue is served in order of arrival, the urgent first, whenever the head of line fits."""

    name: str
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)

    @property
    def free(self) -> int:
        return TOTAL - sum(request.blocks for request in self.running)

    def load(self) -> InstanceLoad:
        head = self.waiting[0] if self.waiting else None
        demand = head.blocks if head else 0
        urgent = ["urgent" for request in (*self.running, *self.waiting) if request.urgent]
        kept = headroom_of(urgent, HEADROOM)
        usage = virtual_usage(
            TOTAL - self.free, self.free, demand, False, sum(kept.values()), False
        )
        return InstanceLoad(
            self.name,
            "running",
            blocks_total=TOTAL,
            blocks_used=TOTAL - self.free,
            running=len(self.running),
            waiting=len(self.waiting),
            head_of_line_blocks=demand,
            head_of_line_since=head.since if head else 0.0,
            head_of_line_priority=-10 * head.urgent if head else 0,
            freeness=freeness(TOTAL, usage, len(self.running), len(self.waiting)),
            headroom_blocks=kept,
            staying=len(urgent),
        )

    def schedule(self) -> None:
        self.waiting.sort(key=lambda request: (not request.urgent, request.since))
        while self.waiting and self.waiting[0].blocks <= self.free:
            self.running.append(self.waiting.pop(0))

    def give(self, target: Target) -> Request | None:
        """Chosen as the llumlet does."""
        demand = self.waiting[0].blocks if self.waiting else 0
        movable = [
            Movable(
                request.name,
                -10 * request.urgent,
                request.blocks,
                request.blocks,
                0 if request in self.waiting else request.blocks,
                request.since,
                request.urgent,
            )
            for request in (*self.waiting, *self.running)
        ]
        deficit = max(demand, len(self.running)) - self.free
        name = choose_request(movable, target.room, deficit, target.before)
        for requests in (self.waiting, self.running):
            for request in requests:
                if request.name == name:
                    requests.remove(request)
                    return request
        return None


def move_once(fleet: dict[str, Instance], source: str, target: Target) -> bool:
    """One request of a pair moves; what must hold of the two is checked."""
    here, there = fleet[source], fleet[target.replica_id]
    before, taker = here.load(), there.load()
    waited = len(here.waiting)
    lends = target.room > there.free - taker.headroom
    was_blocked = bool(there.waiting) and there.waiting[0].blocks > there.free
    request = here.give(target)
    if request is None:
        return False
    if len(here.waiting) < waited:
        there.waiting.append(request)
        there.schedule()
        assert request in there.running, "it waits there as it did here"
    else:
        there.running.append(request)
    assert there.free >= len(there.running), "somebody is preempted there"
    if lends or was_blocked:
        assert there.load().blocks_used > taker.blocks_used, "idle blocks are used"
    elif not request.urgent:
        assert there.load().freeness > before.freeness, "the imbalance rose"
    if len(here.waiting) == waited and before.freeness >= 0:
        assert here.load().freeness > before.freeness, "nothing was gained"
    return True


@st.composite
def fleets(draw) -> dict[str, Instance]:
    fleet = {}
    count = 0
    for number in range(draw(st.integers(1, 5))):
        instance = Instance(f"i{number}")
        for blocks in draw(st.lists(st.integers(1, 60), max_size=8)):
            count += 1
            since, urgent = draw(st.floats(0, 100)), draw(st.integers(0, 3)) == 3
            instance.waiting.append(Request(f"r{count}", blocks, since, urgent))
        instance.schedule()
        fleet[instance.name] = instance
    return fleet


rules = st.builds(PairingRule, st.floats(0, 40), st.floats(1, 40), st.floats(0.01, 5))


@settings(max_examples=400)
@given(fleets(), rules)
def test_a_fleet_in_which_nothing_else_happens_comes_to_rest(fleet, rule):
    requests = sum(len(x.running) + len(x.waiting) for x in fleet.values())
    for _ in range(20 * (requests + 1)):
        pairs = pair([instance.load() for instance in fleet.values()], rule)
        moved = [move_once(fleet, source, target) for source, (target,) in pairs.items()]
        for instance in fleet.values():
            instance.schedule()
        if not any(moved):
            return
    raise AssertionError("requests move for ever")


def test_nobody_takes_the_blocks_that_an_urgent_request_waits_for_though_it_came_later():
    crowded = Instance("a", [Request("r1", 60, 0), Request("r2", 35, 0)], [Request("r3", 12, 1)])
    urgent = Instance("b", [Request("r4", 46, 0)], [Request("r5", 55, 50, urgent=True)])
    fleet = {"a": crowded, "b": urgent}
    pairs = pair([instance.load() for instance in fleet.values()], PairingRule(3, 1, 1))
    (target,) = pairs.pop("b")
    assert not pairs
    assert not move_once(fleet, "b", target), "there is no room for what runs"
