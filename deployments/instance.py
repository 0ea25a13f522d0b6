"""An instance: vLLM's engine, its step thread, its llumlet and both sides of a move."""

import asyncio
import logging
import time
from functools import partial

from ray.serve.handle import DeploymentHandle
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from app.config import FleetConfig
from deployments import engine_config
from deployments.engine_loop import EngineLoop
from deployments.llumlet import Llumlet
from deployments.messages import Hello
from deployments.metrics import ReplicaMetrics
from deployments.outbox import Outbox
from deployments.pinned import ServePeer, call
from deployments.reporter import Reporter
from migration.destination import Limits, MigrateIn
from migration.engine_seam import EngineSeam
from migration.links import Links
from migration.movable import can_redraw
from migration.protocol.timing import orphan_s
from migration.snapshot import MigrationRecord, Submission
from migration.source import MigrateOut

STUCK_STEP_S = 60.0
"""A step that takes longer is a hung engine; the longest honest one is a large prefill."""

logger = logging.getLogger("ray.serve.llumnix")


class Instance:
    """What an LLMReplica holds. Made on the replica's event loop; the model is loaded meanwhile."""

    def __init__(
        self,
        replica_id: str,
        config: FleetConfig,
        worker_extension: str | None,
        peers: DeploymentHandle,
        scheduler: DeploymentHandle,
    ) -> None:
        self.replica_id = replica_id
        vllm_config = engine_config.build(config.model, config.engine, worker_extension)
        frozen = engine_config.freeze(vllm_config)
        settings = config.migration
        # In and out, and as many joins and leaves beside them.
        core = engine_config.start(vllm_config, transfers=4 * settings.max_concurrent)
        if not config.engine.emulated:
            engine_config.warm_up(core)
        self._event_loop = asyncio.get_running_loop()
        self._metrics = ReplicaMetrics()
        self._outbox = Outbox(replica_id)
        self._seam = EngineSeam(core, self._outbox)
        self.hello = Hello(
            vllm_config=frozen,
            max_model_len=vllm_config.model_config.max_model_len,
            num_gpu_blocks=vllm_config.cache_config.num_gpu_blocks or 0,
            supported_tasks=tuple(core.get_supported_tasks()),
            fingerprint=engine_config.fingerprint(config.model, config.engine),
            can_redraw=can_redraw(core),
        )
        self._steps = EngineLoop(core, self._publish, self._on_death)
        self.links = Links(replica_id, self._steps, self._seam, settings.backend)
        self.llumlet = Llumlet(
            replica_id,
            self.hello.fingerprint,
            self._steps,
            self._seam,
            config.headroom_tokens,
            settings.max_concurrent,
            orphan_s(settings.timeout_s),
            self._on_record,
        )
        if config.engine.emulated:
            self.llumlet.survey.emulation_drift = lambda: core.collective_rpc("emulation_drift")[0]
        self.outgoing = MigrateOut(
            replica_id,
            self._steps,
            self._seam,
            self.links,
            partial(ServePeer, peers),
            settings.timeout_s,
            settings.max_stages,
        )
        self.incoming = MigrateIn(
            self._steps,
            self._seam,
            self.links,
            Limits(settings.max_concurrent, settings.timeout_s),
            self.llumlet.own,
            self.llumlet.disown,
            time.monotonic,
        )
        self.llumlet.connect(self.outgoing, self.incoming)
        self._steps.start()
        send = partial(call, scheduler, "report")
        self._reporter = Reporter(self.llumlet, send, self._metrics.observe, settings.enabled)
        self._reporter.start()
        logger.info("instance %s up: %d KV blocks", replica_id, self._seam.blocks_total)

    def check_health(self) -> None:
        """Raise where the engine is dead or hangs."""
        if self._steps.dead is not None:
            raise RuntimeError(f"engine of {self.replica_id} is dead: {self._steps.dead}")
        stuck = self.stuck_for()
        if stuck > STUCK_STEP_S:
            raise RuntimeError(f"engine of {self.replica_id} hangs: one step for {stuck:.0f} s")

    def stuck_for(self) -> float:
        """Seconds that the engine's present step has taken."""
        return self._steps.stuck_for(time.monotonic())

    def _publish(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """On the step thread, after each step."""
        finished: list[str] = []
        for index, step in outputs.items():
            self._outbox.send_step(index, step)
            for output in step.outputs:
                if output.events:
                    self._observe_events(output)
                if output.finished:
                    finished.append(output.request_id)
        if finished:
            self._event_loop.call_soon_threadsafe(self.llumlet.finished, finished)

    def _observe_events(self, output: EngineCoreOutput) -> None:
        owned = self.llumlet.owned.get(output.request_id)
        if owned is not None and output.events:
            self._metrics.observe_events(output.events, owned.submission.priority_class)

    def _on_record(self, submission: Submission, record: MigrationRecord) -> None:
        self._metrics.observe_migration(record)
        self._steps.call(partial(self._outbox.send_record, submission.ingress, record))

    def _on_death(self, error: BaseException) -> None:
        """On the step thread: open calls must fail now, not when their callers lose patience."""
        self._event_loop.call_soon_threadsafe(self.llumlet.fail_all, error)
