"""The data plane: Ray collective groups of two, one per (source, destination, worker rank).

`GlooPair` and `NcclPair` are backends of ours in Ray's backend registry. Ray's own gloo group wants
to initialise torch.distributed, which vLLM has done already. Its NCCL group needs CuPy, knows
nothing of torch's streams, finds its peer only if both use the GPU of the same index, and waits
forever for one that died. All calls must come from a Ray actor process; a pair carries traffic from
rank 0 to rank 1 only and one transfer at a time, so order needs no tags and nobody can deadlock.
Between GPUs `send` and `receive` only queue the copy on torch's current stream: `settle` waits.
"""

from typing import Literal

import torch
from ray.util import collective
from ray.util.collective.backend_registry import register_collective_backend

from migration.pairs.gloo import GlooPair
from migration.pairs.nccl import NcclPair

Backend = Literal["gloo", "nccl"]

_BACKENDS = {"gloo": "GLOO_PAIR", "nccl": "NCCL_PAIR"}


def backend_for(device: torch.device, wanted: str) -> Backend:
    """`auto` means NCCL for KV caches in GPU memory, gloo for those in host memory."""
    if wanted == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    return "nccl" if wanted == "nccl" else "gloo"


def join(group: str, rank: int, backend: Backend, device: torch.device) -> None:
    """Join as rank 0 (source) or 1 (destination), and send one word through to warm it up.

    `device`: that of the KV cache, which is not the GPU of a new thread.
    """
    collective.init_collective_group(2, rank, _BACKENDS[backend], group)
    word = torch.zeros(1, dtype=torch.uint8, device=device)
    send(group, word) if rank == 0 else receive(group, word)
    settle(group)


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


def settle(group: str) -> None:
    """Wait for all that the current stream was given; whatever happens, it does nothing more then.

    Raises where the peer does not do its part in time, or the group was left.
    """
    if collective.is_group_initialized(group):
        collective.get_group_handle(group).settle()
    elif torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
        raise RuntimeError(f"{group} was left")


register_collective_backend("GLOO_PAIR", GlooPair)
register_collective_backend("NCCL_PAIR", NcclPair)
