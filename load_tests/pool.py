"""One pool of all instances' memory: what placement and rescheduling come close to at best.

The whole fleet as one instance, first come, first served: no block is free in the wrong place, no
instance is busier than another, nothing has to move. What queues here, queues for memory that the
fleet does not have, unless shorter requests are served first. Delays of calls and of HTTP are left
out, and a step of all instances lasts as long as their mean.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deployments.emulated.profile import Profile, load_profile
from load_tests.outcome import Run, Served
from load_tests.scenario import Scenario
from load_tests.traces.trace import TraceError, TraceRequest

POLICY = "pool"

KEPT_FREE = 0.01
"""Share of the blocks that admission leaves free: vLLM's `watermark`, as the scenarios set it."""


@dataclass(slots=True, eq=False)
class _Request:
    """`context`: tokens whose KV it holds, or will once it runs; `left`: tokens still to make."""

    served: Served
    context: int
    left: int
    preempted_at: float | None = None


def run(scenario: Scenario, rate: float, progress: Callable[[], None]) -> Run:
    """The trace at `rate`, as a run of the policy `pool` in the simulator's results."""
    pool = Pool(load_profile(scenario.profile), scenario.instances)
    duration = pool.play(scenario.trace_at(rate), progress)
    return Run(
        scenario=scenario.name,
        policy=POLICY,
        rate=rate,
        backend="simulator",
        instances=scenario.instances,
        model_id="emulated",
        duration=duration,
        served=pool.served,
        samples=[],
        moves=[],
    )


class Pool:
    """All instances in one. Steps last as long as those of an instance with an even share."""

    def __init__(self, profile: Profile, instances: int) -> None:
        self._profile = profile
        self._instances = instances
        self._blocks = profile.blocks * instances
        self._watermark = int(KEPT_FREE * self._blocks)
        self._queue: deque[_Request] = deque()
        self._running: list[_Request] = []
        self.served: list[Served] = []

    def play(self, trace: Sequence[TraceRequest], progress: Callable[[], None]) -> float:
        """All requests of a trace; the seconds until the last of them ended. Raises TraceError."""
        longest = max(request.input_tokens + request.output_tokens for request in trace)
        if longest // self._profile.block_size + 1 > self._blocks - self._watermark:
            raise TraceError(f"a request of {longest} tokens does not fit into the pool")
        arriving = deque(trace)
        now = 0.0
        while arriving or self._queue or self._running:
            if not self._queue and not self._running:
                now = max(now, arriving[0].at)
            while arriving and arriving[0].at <= now:
                self._arrive(arriving.popleft())
            now = self._step(now)
            for request in self._running:
                if not request.left:
                    progress()
            self._running = [request for request in self._running if request.left]
        return now

    def _arrive(self, request: TraceRequest) -> None:
        served = Served(
            f"r{len(self.served):06}",
            request.at,
            request.input_tokens,
            request.output_tokens,
            request.priority,
        )
        self.served.append(served)
        self._queue.append(_Request(served, request.input_tokens, request.output_tokens))

    def _step(self, now: float) -> float:
        """A token for everyone that runs, and for those that fit in besides; when it is over."""
        used = self._preempt(sum(map(self._held, self._running)), now)
        joining = self._admit(used, now)
        prefill = sum(request.context for request in joining)
        decode = sum(request.context for request in self._running)
        tokens = (len(self._running) + prefill) / self._instances
        profile = self._profile
        end = now + max(profile.weights_s, profile.token_s * tokens)
        end += profile.context_s * decode / self._instances
        self._running += joining
        for request in self._running:
            # One instance computes all of a prompt, however many others have nothing to do.
            alone = profile.token_s * request.context if request in joining else 0.0
            self._emit(request, max(end, now + alone))
        return end

    def _emit(self, request: _Request, at: float) -> None:
        if request.preempted_at is not None:
            request.served.preempted_s += at - request.preempted_at
            request.preempted_at = None
        tokens = request.served.tokens
        tokens.append(max(at, tokens[-1]) if tokens else at)
        request.context += 1
        request.left -= 1

    def _preempt(self, used: int, now: float) -> int:
        """As vLLM, the last that came: its KV is computed anew. The blocks in use then."""
        while used > self._blocks:
            last = self._running.pop()
            used -= self._held(last)
            last.preempted_at = now
            last.served.preemptions += 1
            self._queue.appendleft(last)
        return used

    def _admit(self, used: int, now: float) -> list[_Request]:
        """In the order of the queue, as many as fit and as all instances compute in one step."""
        joining: list[_Request] = []
        budget = self._profile.max_step_tokens * self._instances
        while self._queue and budget > 0:
            used += self._held(self._queue[0])
            if used > self._blocks - self._watermark:
                break
            request = self._queue.popleft()
            budget -= request.context
            if not request.served.tokens:
                request.served.queue_s = now - request.served.arrival
            joining.append(request)
        return joining

    def _held(self, request: _Request) -> int:
        """Blocks for its context and the token that the next step makes."""
        return request.context // self._profile.block_size + 1
