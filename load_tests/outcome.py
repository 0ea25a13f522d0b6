"""What came of a scenario: the one form that the real fleet and the simulator both produce.

Times are seconds from the start of the run, virtual or not; those of its moves (`at`) too.
"""

from array import array
from dataclasses import dataclass, field

from deployments.policy.load import InstanceLoad
from migration.snapshot import MigrationRecord

REFUSED = "HTTP 429"
"""How the error begins of a request that back-pressure refused."""


@dataclass(slots=True)
class Served:
    """One request of the trace and what became of it; `error` is empty where all went well.

    `tokens` are the times at which its output tokens arrived. `queue_s`: from arrival at the first
    instance until it ran. `preempted_s`: from each preemption until the next token, summed up.
    `moves`: completed migrations; `preempted_after_move`: preemptions at an instance it moved to.
    """

    request_id: str
    arrival: float
    input_tokens: int
    output_tokens: int
    priority: str = "normal"
    tokens: array = field(default_factory=lambda: array("d"))
    error: str = ""
    queue_s: float = 0.0
    preemptions: int = 0
    preempted_s: float = 0.0
    moves: int = 0
    preempted_after_move: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """The loads of all instances at one time."""

    at: float
    loads: tuple[InstanceLoad, ...]


@dataclass(slots=True)
class Run:
    """One policy at one rate. `backend`: fleet | simulator.

    `facts` are further numbers worth keeping (drift of the emulated clock, decision times, ...).
    """

    scenario: str
    policy: str
    rate: float
    backend: str
    instances: int
    model_id: str
    duration: float
    served: list[Served]
    samples: list[Sample]
    moves: list[MigrationRecord]
    facts: dict[str, float] = field(default_factory=dict)
