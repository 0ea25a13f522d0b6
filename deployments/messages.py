"""What crosses between replicas, scheduler, routers and the ingress."""

from dataclasses import dataclass, field

from deployments.policy.load import InstanceLoad
from deployments.policy.pairing import Target

REPLICA = "LLMReplica"
SCHEDULER = "Scheduler"
INGRESS = "Ingress"


@dataclass(frozen=True, slots=True)
class Report:
    """Replica -> scheduler: its load, and the requests that arrived since the last report."""

    load: InstanceLoad
    arrived: tuple[str, ...] = ()
    migrations: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Orders:
    """Scheduler -> replica, as the answer to its report: hand requests over to one of `targets`,
    the first before the next; to several at once only while draining.
    """

    targets: tuple[Target, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """Router -> scheduler: where should this request go?

    `prompt_tokens`: to be computed there, so with those generated so far where it goes on.
    `headroom_tokens`: its class's. `avoid`: replicas that are lost or hang.
    """

    request_id: str
    prompt_tokens: int
    fingerprint: str = ""
    priority_class: str = "normal"
    headroom_tokens: int = 0
    avoid: frozenset[str] = frozenset()

    @property
    def keeps_headroom(self) -> bool:
        """Whether its class does."""
        return self.headroom_tokens > 0


@dataclass(slots=True)
class Route:
    """What an ingress and the router in its process tell each other of a call.

    `avoid`: replicas that are lost or hang, as the ingress knows before Serve does. `chosen`: where
    the router sent the request; nobody else could tell until that replica says that it has it.
    """

    avoid: frozenset[str] = frozenset()
    chosen: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Scheduler -> router: one replica id (or None) for each ask, and all loads, to decide without
    it.
    """

    chosen: tuple[str | None, ...]
    loads: tuple[InstanceLoad, ...]


@dataclass(frozen=True, slots=True)
class FleetView:
    """Scheduler -> admin API: the last load of each instance and the fleet's migration counts."""

    loads: tuple[InstanceLoad, ...]
    migrations: dict[str, int]


@dataclass(frozen=True, slots=True)
class Hello:
    """Replica -> ingress: what is needed to run a front end for it.

    `vllm_config` is the VllmConfig pickled before the EngineCore was made (after that it drags the
    KV cache along: 1 GB); `max_model_len` and `num_gpu_blocks` are what the engine found out.
    `fingerprint`: of the model and the engine configuration (`engine_config.fingerprint`).
    `can_redraw`: whether seeded requests can go on from their tokens (`migration.movable`).
    """

    vllm_config: bytes
    max_model_len: int
    num_gpu_blocks: int
    supported_tasks: tuple[str, ...]
    fingerprint: str
    can_redraw: bool = True
