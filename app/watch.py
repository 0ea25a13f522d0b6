"""Watch: sees, now and then, to what no event would tell of: late tokens, instances that hang."""

import asyncio
import time

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from app.keeper import Keeper
from app.tasks import Tasks
from app.vitals import Vitals
from deployments.pinned import ReplicaGone, call, pinned

WATCH_S = 0.5


class Watch:
    """Asks the replicas that are quiet how they are."""

    def __init__(
        self,
        replicas: DeploymentHandle,
        keeper: Keeper,
        vitals: Vitals,
        answer_s: float,
        tasks: Tasks,
    ) -> None:
        self._replicas = replicas
        self._keeper = keeper
        self._vitals = vitals
        self._answer_s = answer_s
        self._tasks = tasks
        self._asked: set[str] = set()

    async def run(self) -> None:
        """For as long as the ingress lives."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            if now - before > 2 * WATCH_S:
                self._vitals.overslept(now)
                continue  # first of all, what came meanwhile is read
            self._keeper.look_after(now)
            for replica_id in self._vitals.quiet(now):
                if replica_id not in self._asked:
                    self._asked.add(replica_id)
                    self._tasks.start(self._ask(replica_id))

    async def _ask(self, replica_id: str) -> None:
        try:
            async with asyncio.timeout(self._answer_s):
                step_s: float = await call(pinned(self._replicas, replica_id), "pulse")
        except (RayActorError, ReplicaGone):
            self._vitals.lost(replica_id, time.monotonic())
        except Exception:  # gRPC has some of its own
            pass  # by its silence it will be known
        else:
            self._vitals.heard(replica_id, time.monotonic(), step_s)
        finally:
            self._asked.discard(replica_id)
