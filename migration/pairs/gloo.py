"""Two processes joined by gloo, apart from torch.distributed's state."""

import threading
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.experimental import internal_kv
from ray.util.collective.types import RecvOptions, SendOptions

from migration.pairs.pair import PAIR_TIMEOUT_S, Pair


class GlooPair(Pair):
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
        self._left = False

    @classmethod
    def backend(cls) -> str:
        return "GLOO_PAIR"

    @classmethod
    def check_backend_availability(cls) -> bool:
        return dist.is_gloo_available()

    def send(self, tensor: list[torch.Tensor], send_options: SendOptions) -> None:
        host = [one.cpu() for one in tensor]  # itself, on CPUs
        self._connected().send(host, send_options.dst_rank, 0).wait()

    def recv(self, tensor: list[torch.Tensor], recv_options: RecvOptions) -> None:
        host = [torch.empty_like(one, device="cpu") if one.is_cuda else one for one in tensor]
        self._connected().recv(host, recv_options.src_rank, 0).wait()
        for one, copy in zip(tensor, host, strict=True):
            if one is not copy:
                one.copy_(copy)

    def destroy_group(self) -> None:
        # Without the lock, which a join that hangs holds: Ray's own for all groups is held here.
        self._left = True
        self._group = self._store = None
        if self.rank == 0:
            internal_kv._internal_kv_del(self._key())

    def _connected(self) -> Any:
        with self._lock:
            if self._left:
                raise RuntimeError(f"{self.group_name} was left")
            group = self._group
            if group is None:
                self._store = self._open_store()
                group = self._group = dist.ProcessGroupGloo(
                    self._store, self.rank, self.world_size, timedelta(seconds=PAIR_TIMEOUT_S)
                )
            return group

    def _open_store(self) -> Any:
        timeout = timedelta(seconds=PAIR_TIMEOUT_S)
        if self.rank == 0:
            host = ray.util.get_node_ip_address()
            store = dist.TCPStore(
                host, 0, self.world_size, is_master=True, wait_for_workers=False, timeout=timeout
            )
            internal_kv._internal_kv_put(self._key(), f"{host}:{store.port}".encode())
            return store
        host, port = self._await(self._key()).decode().rsplit(":", 1)
        return dist.TCPStore(host, int(port), self.world_size, is_master=False, timeout=timeout)
