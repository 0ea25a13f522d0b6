"""The data plane: Ray collective groups of two, one per (source, destination, worker rank).

On GPUs the groups are Ray's own NCCL groups. Ray's gloo group wants to initialise
torch.distributed, which vLLM has done already, so CPUs use `GlooPair`, a backend of ours in Ray's
backend registry. All calls block, and must come from a Ray actor process; a pair carries traffic
from rank 0 to rank 1 only and one transfer at a time, so order needs no tags and nobody can
deadlock.
"""

import threading
import time
from datetime import timedelta
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from ray.experimental import internal_kv
from ray.util import collective
from ray.util.collective.backend_registry import register_collective_backend
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from ray.util.collective.types import RecvOptions, SendOptions

Backend = Literal["gloo", "nccl"]

PAIR_TIMEOUT_S = 20.0
"""Longest that a join or one chunk may take. Gloo closes a pair that times out: it is then remade.
"""

_BACKENDS = {"gloo": "GLOO_PAIR", "nccl": "NCCL"}


def backend_for(device: torch.device, wanted: str) -> Backend:
    """`auto` means NCCL for KV caches in GPU memory, gloo for those in host memory."""
    if wanted == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    return "nccl" if wanted == "nccl" else "gloo"


def join(group: str, rank: int, backend: Backend) -> None:
    """Join as rank 0 (source) or 1 (destination), and send one word through to warm it up."""
    collective.init_collective_group(2, rank, _BACKENDS[backend], group)
    device = "cuda" if backend == "nccl" else "cpu"
    word = torch.zeros(1, dtype=torch.uint8, device=device)
    send(group, word) if rank == 0 else receive(group, word)


def leave(group: str) -> None:
    """Leave and forget `group`; nothing happens where it is unknown."""
    if collective.is_group_initialized(group):
        collective.destroy_collective_group(group)


def send(group: str, tensor: torch.Tensor) -> None:
    """Rank 0: send a contiguous tensor. Raises where the peer died or does not take it in time."""
    collective.send(tensor, 1, group)


def receive(group: str, tensor: torch.Tensor) -> None:
    """Rank 1: fill a contiguous tensor with what rank 0 sends."""
    collective.recv(tensor, 0, group)


class GlooPair(BaseGroup):
    """Two processes joined by gloo over a TCP store of their own, apart from torch.distributed's
    state.

    The connection is made at first use, not in the constructor, because Ray constructs groups under
    a lock of the whole process: two instances joining a third would wait for each other.
    """

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self._lock = threading.Lock()
        self._group: Any = None
        self._store: Any = None

    @classmethod
    def backend(cls) -> str:
        return "GLOO_PAIR"

    @classmethod
    def check_backend_availability(cls) -> bool:
        return dist.is_gloo_available()

    def send(self, tensor: list[torch.Tensor], send_options: SendOptions) -> None:
        self._connected().send(tensor, send_options.dst_rank, 0).wait()

    def recv(self, tensor: list[torch.Tensor], recv_options: RecvOptions) -> None:
        self._connected().recv(tensor, recv_options.src_rank, 0).wait()

    def destroy_group(self) -> None:
        with self._lock:
            self._group = self._store = None
        if self.rank == 0:
            internal_kv._internal_kv_del(self._key())

    def _connected(self) -> Any:
        with self._lock:
            if self._group is None:
                self._store = self._open_store()
                self._group = dist.ProcessGroupGloo(
                    self._store, self.rank, self.world_size, timedelta(seconds=PAIR_TIMEOUT_S)
                )
            return self._group

    def _open_store(self) -> Any:
        timeout = timedelta(seconds=PAIR_TIMEOUT_S)
        if self.rank == 0:
            host = ray.util.get_node_ip_address()
            store = dist.TCPStore(
                host, 0, self.world_size, is_master=True, wait_for_workers=False, timeout=timeout
            )
            internal_kv._internal_kv_put(self._key(), f"{host}:{store.port}".encode())
            return store
        host, port = self._await_address().rsplit(":", 1)
        return dist.TCPStore(host, int(port), self.world_size, is_master=False, timeout=timeout)

    def _await_address(self) -> str:
        """Rank 0 may still be on its way: the two join at the same time."""
        deadline = time.monotonic() + PAIR_TIMEOUT_S
        while time.monotonic() < deadline:
            if address := internal_kv._internal_kv_get(self._key()):
                return address.decode()
            time.sleep(0.005)
        raise TimeoutError(f"the other end of {self.group_name} did not show up")

    def _key(self) -> str:
        return f"llumnix:pair:{self.group_name}"

    def allreduce(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a pair only sends and receives")

    barrier = reduce = allgather = broadcast = reducescatter = allreduce


register_collective_backend("GLOO_PAIR", GlooPair)
