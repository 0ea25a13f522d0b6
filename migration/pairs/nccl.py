"""Two GPUs joined by NCCL, through vLLM's binding of it."""

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from ray.experimental import internal_kv
from ray.util.collective.types import RecvOptions, SendOptions

from migration.pairs.pair import PAIR_TIMEOUT_S, Pair


class NcclPair(Pair):
    """Two GPUs joined by NCCL, through vLLM's binding of it.

    A copy runs on torch's current stream, so behind the gather whose result it sends and ahead of
    the scatter of what it received, and a freed buffer goes to later work of that stream only.
    Nothing here blocks under Ray's lock for all groups of the process: not the constructor (the
    connection is made at first use), nor `destroy_group` (the abort has a thread of its own).
    """

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self._lock = threading.Lock()
        self._comm: Any = None
        self._left = False

    @classmethod
    def backend(cls) -> str:
        return "NCCL_PAIR"

    @classmethod
    def check_backend_availability(cls) -> bool:
        return torch.cuda.is_available()

    def send(self, tensor: list[torch.Tensor], send_options: SendOptions) -> None:
        self._queue(_nccl().ncclSend, tensor[0], send_options.dst_rank)

    def recv(self, tensor: list[torch.Tensor], recv_options: RecvOptions) -> None:
        self._queue(_nccl().ncclRecv, tensor[0], recv_options.src_rank)

    def settle(self) -> None:
        stream, done = torch.cuda.current_stream(), torch.cuda.Event()
        done.record(stream)
        deadline = time.monotonic() + PAIR_TIMEOUT_S
        while not done.query() and not self._left and time.monotonic() < deadline:
            time.sleep(0.0002)
        if done.query() and not self._left:
            return
        self._abort()  # what hangs ends now
        stream.synchronize()
        raise RuntimeError(f"a copy over {self.group_name} did not end in {PAIR_TIMEOUT_S:.0f} s")

    def destroy_group(self) -> None:
        self._left = True
        threading.Thread(target=self._abort, name="nccl-abort", daemon=True).start()
        for what in ("pair", "met"):
            internal_kv._internal_kv_del(self._key(what))

    def _queue(self, call: Callable[..., None], tensor: torch.Tensor, peer: int) -> None:
        from vllm.distributed.device_communicators import pynccl_wrapper as nccl

        stream = torch.cuda.current_stream(tensor.device)
        where, bits = nccl.buffer_type(tensor.data_ptr()), nccl.ncclDataTypeEnum.ncclUint8
        with self._lock, torch.cuda.device(tensor.device):
            comm = self._connected()
            call(where, tensor.nbytes, bits, peer, comm, nccl.cudaStream_t(stream.cuda_stream))

    def _connected(self) -> Any:
        """On the current device; under the lock."""
        if self._left:
            raise RuntimeError(f"{self.group_name} was left")
        if self._comm is None:
            self._comm = _nccl().ncclCommInitRank(2, self._meet(), self.rank)
        return self._comm

    def _meet(self) -> Any:
        """The id that both join. Neither begins alone: NCCL would wait for the other forever."""
        if self.rank == 0:
            unique = _nccl().ncclGetUniqueId()
            internal_kv._internal_kv_put(self._key(), bytes(unique))
            self._await(self._key("met"))
            return unique
        unique = _nccl().unique_id_from_bytes(self._await(self._key()))
        internal_kv._internal_kv_put(self._key("met"), b"yes")
        return unique

    def _abort(self) -> None:
        with self._lock:
            self._left = True
            comm, self._comm = self._comm, None
            if comm is not None:
                _nccl().ncclCommAbort(comm)


@cache
def _nccl() -> Any:
    """NCCL as torch brings it. ctypes lets other threads run during its calls."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return NCCLLibrary()
