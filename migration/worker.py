"""What a move needs inside vLLM's workers: KV blocks in and out, and the V1 runner's sampler state.

Mixed into vLLM's Worker through `worker_extension_cls`, so the same code serves the worker in the
replica process and the ranks of a distributed executor. Transfers only touch blocks that nobody
else writes, so they may run beside the step thread; the rest runs between two steps.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from migration import transport
from migration.seeded_prefill import hide_generators_of_unfinished_prefills

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData

CHUNK_BYTES = 2 << 20
"""Few, large operations: each one takes the GIL from the step thread once (moving.md, H)."""

GPU_CHUNK_BYTES = 64 << 20
"""A block of an 8B model has 2 MiB already, and NCCL wants more at a time. One is buffered."""

JOBS_REMEMBERED = 256
"""Far more than can be under way; a result is asked for within milliseconds."""


class MigrationWorker:
    """Methods called by `collective_rpc`; `mig_` keeps them apart from vLLM's own."""

    model_runner: Any
    rank: int

    def mig_prepare(self, threads: int) -> None:
        """Once, after the engine came up. `threads`: most transfers and joins at once.

        Raises ValueError for a model without a KV cache: there is nothing to place or to move.
        """
        if not self._mig_kv():
            raise ValueError("the model has no KV cache (an encoder): serve it by plain vLLM")
        self._mig_thread = threading.local()
        self._mig_threads = ThreadPoolExecutor(threads, "kv-copy", self._mig_enter_thread)
        self._mig_jobs: OrderedDict[str, Future[int]] = OrderedDict()
        if self._mig_kv()[0].device.type == "cpu" and hasattr(self.model_runner, "requests"):
            hide_generators_of_unfinished_prefills(self.model_runner)

    def mig_start(self, job: str, method: str, *args: Any) -> None:
        """Begin `mig_join`, `mig_leave`, `mig_send` or `mig_receive` on a thread, and return.

        So the steps go on while it blocks, also in a worker process that can do only one call of
        its executor at a time.
        """
        self._mig_jobs[job] = self._mig_threads.submit(getattr(self, method), *args)
        while len(self._mig_jobs) > JOBS_REMEMBERED:
            self._mig_jobs.popitem(last=False)

    def mig_poll(self, job: str) -> int | str | None:
        """The result of a job, None while it runs, or as text what it raised.

        Raised here, it would leave the other ranks' answers in their queues, for the next call to
        take them for its own (vLLM's MultiprocExecutor stops reading at the first failure).
        """
        future = self._mig_jobs[job]
        if not future.done():
            return None
        error = future.exception()
        return future.result() if error is None else f"{type(error).__name__}: {error}"

    def mig_join(self, group: str, rank: int, backend: str) -> int:
        """Join the pair group with the worker of the same rank on the other instance."""
        device = self._mig_kv()[0].device
        chosen = transport.backend_for(device, backend)
        with self._mig_side_stream(group):
            transport.join(self._mig_group(group), rank, chosen, device)
        return 0

    def mig_leave(self, group: str) -> int:
        """Leave the pair group, if it was joined."""
        transport.leave(self._mig_group(group))
        return 0

    def mig_send(self, group: str, block_ids: list[int]) -> int:
        """Send these KV blocks of every layer, in order. Returns the bytes sent."""
        sent = 0
        with self._mig_side_stream(group):
            for ids in self._mig_chunks(block_ids):
                packed = torch.stack(
                    [kv.index_select(self._mig_dim(), ids) for kv in self._mig_kv()]
                )
                transport.send(self._mig_group(group), packed)
                sent += packed.nbytes
        return sent

    def mig_receive(self, group: str, block_ids: list[int]) -> int:
        """Receive KV blocks of every layer into these. Returns the bytes received."""
        received = 0
        with self._mig_side_stream(group):
            for ids in self._mig_chunks(block_ids):
                packed = self._mig_buffer(len(ids))
                transport.receive(self._mig_group(group), packed)
                self._mig_write(ids, packed)
                received += packed.nbytes
        return received

    def mig_generator(self, request_id: str) -> bytes | None:
        """State of the request's generator; None if unseeded, or if none is kept (V2 runner)."""
        state = getattr(self.model_runner, "requests", {}).get(request_id)
        if state is None or state.generator is None:
            return None
        return state.generator.get_state().numpy().tobytes()

    def mig_seed(self, new: "NewRequestData", outputs: list[int], generator: bytes | None) -> None:
        """Make the V1 runner know a request that continues with `outputs`, as if it was preempted.

        The V2 runner learns all of it from the scheduler and hashes (seed, position) instead of
        keeping a generator, so there is nothing to do. Without a `generator` state (after a crash)
        the seed's is advanced by one draw per token (moving.md, D2); a greedy request has none.
        """
        if not hasattr(self.model_runner, "requests"):
            return
        from vllm.sampling_params import SamplingType
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        params = new.sampling_params
        assert params is not None
        rng = None
        if params.seed is not None and params.sampling_type is not SamplingType.GREEDY:
            rng = torch.Generator(device=self.model_runner.device)
            rng.manual_seed(params.seed)
            if generator is not None:
                rng.set_state(torch.frombuffer(bytearray(generator), dtype=torch.uint8))
            elif outputs:
                torch.randint(0, 2**31, (len(outputs),), generator=rng, device=rng.device)
        state = CachedRequestState(
            req_id=new.req_id,
            prompt_token_ids=new.prompt_token_ids,
            mm_features=[],
            sampling_params=params,
            generator=rng,
            block_ids=([],),
            num_computed_tokens=new.num_computed_tokens,
            output_token_ids=list(outputs),
            lora_request=new.lora_request,
        )
        if getattr(self.model_runner, "uses_mrope", False):  # Qwen-VL; else made for new ones only
            self.model_runner._init_mrope_positions(state)
        self.model_runner.requests[new.req_id] = state

    def _mig_enter_thread(self) -> None:
        """A new thread's GPU is the first one, whatever its worker's is; and it needs a stream.

        Made once for each thread: torch deals out 32 streams, again and again, and after some more
        it would be one that vLLM copies its tokens on.
        """
        if (device := self._mig_kv()[0].device).type == "cuda":
            torch.cuda.set_device(device)
            self._mig_thread.stream = torch.cuda.Stream(device)

    @contextmanager
    def _mig_side_stream(self, group: str) -> Iterator[None]:
        """On a GPU: a stream apart from the model's, which does not wait for the copy.

        Steps in flight may still use what the blocks held before, so the copy waits for those; and
        its caller for the copy, before it says that the bytes are in place, or that none will be
        written any more. Both waits block the copy's thread alone.
        """
        device = self._mig_kv()[0].device
        if device.type != "cuda":
            yield
            return
        torch.cuda.synchronize(device)
        with torch.cuda.stream(self._mig_thread.stream):
            try:
                yield
            finally:
                transport.settle(self._mig_group(group))

    def _mig_write(self, ids: torch.Tensor, packed: torch.Tensor) -> None:
        for kv, blocks in zip(self._mig_kv(), packed, strict=True):
            kv.index_copy_(self._mig_dim(), ids, blocks)

    def _mig_kv(self) -> list[torch.Tensor]:
        """The KV cache of each layer."""
        return self.model_runner.kv_caches

    def _mig_dim(self) -> int:
        """The dimension that counts blocks: the first on CPU, the second in some GPU layouts."""
        blocks = self.model_runner.kv_cache_config.num_blocks
        return list(self._mig_kv()[0].shape).index(blocks)

    def _mig_buffer(self, blocks: int) -> torch.Tensor:
        caches = self._mig_kv()
        shape = list(caches[0].shape)
        shape[self._mig_dim()] = blocks
        return torch.empty([len(caches), *shape], dtype=caches[0].dtype, device=caches[0].device)

    def _mig_chunks(self, block_ids: list[int]) -> tuple[torch.Tensor, ...]:
        per_block = self._mig_buffer(1).nbytes
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self._mig_kv()[0].device)
        chunk = GPU_CHUNK_BYTES if ids.is_cuda else CHUNK_BYTES
        return ids.split(max(1, chunk // per_block)) if block_ids else ()

    def _mig_group(self, group: str) -> str:
        return f"{group}/{self.rank}"
