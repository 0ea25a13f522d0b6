"""Tokens from a replica to the ingresses: one ZMQ message per engine step and ingress.

They do not ride on Ray: vLLM's msgpack goes over PUSH -> PULL, as between vLLM's own processes.
"""

import contextlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from migration.snapshot import MigrationRecord

MAX_INGRESSES = 256
"""Sockets kept open; the ingress that was silent longest makes room."""

_STEP, _RECORD, _OWNER = b"S", b"M", b"O"


class StepHeader(msgspec.Struct, array_like=True, frozen=True):
    """`first[i]` is the index, in its request's output, of the first token of the i-th output."""

    replica_id: str
    first: list[int]


@dataclass(frozen=True, slots=True)
class Step:
    """What one engine step made for one ingress."""

    replica_id: str
    first: list[int]
    outputs: EngineCoreOutputs


class Ownership(msgspec.Struct, array_like=True, frozen=True):
    """A replica owns this request from its output token number `first` on; sent before that."""

    replica_id: str
    request_id: str
    first: int


@dataclass(slots=True)
class _Ingress:
    index: int
    socket: Any
    first: dict[str, int] = field(default_factory=dict)


class Outbox:
    """Sends to ingresses by address. Used on the step thread only; never blocks, drops if cut off.

    vLLM groups outputs by a client index: this class gives each ingress one.
    """

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._context = zmq.Context(io_threads=1)
        self._encoder = MsgpackEncoder()
        self._header = msgspec.msgpack.Encoder()
        self._ingresses: OrderedDict[str, _Ingress] = OrderedDict()
        self._by_index: dict[int, _Ingress] = {}
        self._next_index = 0

    def client_index(self, address: str) -> int:
        """The client index of the ingress at `address`, which it is connected to if need be."""
        if address not in self._ingresses:
            self._connect(address)
        self._ingresses.move_to_end(address)
        return self._ingresses[address].index

    def expect(self, client_index: int, request_id: str, first: int) -> None:
        """This request is owned here now, and its next output begins with token `first`."""
        ingress = self._by_index[client_index]
        ingress.first[request_id] = first
        owner = self._header.encode(Ownership(self._replica_id, request_id, first))
        self._send(ingress, [_OWNER, owner])

    def forget(self, client_index: int, request_id: str) -> None:
        """The request will have no more outputs here."""
        if ingress := self._by_index.get(client_index):
            ingress.first.pop(request_id, None)

    def send_step(self, client_index: int, outputs: EngineCoreOutputs) -> None:
        """Send what a step made for one ingress."""
        ingress = self._by_index.get(client_index)
        if ingress is None:
            return
        first = [self._advance(ingress, output) for output in outputs.outputs]
        header = self._header.encode(StepHeader(self._replica_id, first))
        self._send(ingress, [_STEP, header, *self._encoder.encode(outputs)])

    def send_record(self, address: str, record: MigrationRecord) -> None:
        """Tell an ingress how an attempt to move one of its requests went."""
        ingress = self._by_index[self.client_index(address)]
        self._send(ingress, [_RECORD, self._header.encode(record)])

    def close(self) -> None:
        """Close all sockets; what is not sent yet is dropped."""
        self._context.destroy(linger=0)

    @staticmethod
    def _advance(ingress: _Ingress, output: Any) -> int:
        first = ingress.first.get(output.request_id, 0)
        if output.finished:
            ingress.first.pop(output.request_id, None)
        else:
            ingress.first[output.request_id] = first + len(output.new_token_ids)
        return first

    def _connect(self, address: str) -> None:
        if len(self._ingresses) >= MAX_INGRESSES:
            _, oldest = self._ingresses.popitem(last=False)
            del self._by_index[oldest.index]
            oldest.socket.close(linger=0)
        socket = self._context.socket(zmq.PUSH)
        socket.sndhwm = 0  # a message dropped here would be a token lost; the ingress reads at once
        socket.connect(address)
        ingress = _Ingress(self._next_index, socket)
        self._next_index += 1
        self._ingresses[address] = self._by_index[ingress.index] = ingress

    @staticmethod
    def _send(ingress: _Ingress, frames: list[Any]) -> None:
        with contextlib.suppress(zmq.Again):  # that ingress is gone, and its requests with it
            ingress.socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)


class Inbox:
    """An ingress' end: steps, changes of owner and migration records of all replicas."""

    def __init__(self, host: str) -> None:
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PULL)
        self._socket.rcvhwm = 0
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._outputs = MsgpackDecoder(EngineCoreOutputs)
        self._header = msgspec.msgpack.Decoder(StepHeader)
        self._record = msgspec.msgpack.Decoder(MigrationRecord)
        self._owner = msgspec.msgpack.Decoder(Ownership)

    async def receive(self) -> Step | Ownership | MigrationRecord:
        """The next message."""
        kind, head, *body = await self._socket.recv_multipart(copy=False)
        if kind.bytes == _RECORD:
            return self._record.decode(head.buffer)
        if kind.bytes == _OWNER:
            return self._owner.decode(head.buffer)
        header = self._header.decode(head.buffer)
        return Step(header.replica_id, header.first, self._outputs.decode(body))

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)
