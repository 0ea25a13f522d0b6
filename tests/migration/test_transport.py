"""The gloo pair between two threads, with a dictionary in place of Ray's key-value store."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ray.util.collective.types import RecvOptions, SendOptions

from migration import transport
from migration.pairs import gloo, pair
from migration.pairs.gloo import GlooPair

WAIT_S = 10.0


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """What Ray keeps for all processes of a cluster."""
    kept = {}
    kv = pair.internal_kv
    monkeypatch.setattr(kv, "_internal_kv_put", kept.__setitem__)
    monkeypatch.setattr(kv, "_internal_kv_get", kept.get)
    monkeypatch.setattr(kv, "_internal_kv_del", lambda key: kept.pop(key, None))
    monkeypatch.setattr(gloo.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    return kept


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def to(rank):
    options = SendOptions()
    options.dst_rank = rank
    return options


def of(rank):
    options = RecvOptions()
    options.src_rank = rank
    return options


class Pair:
    """Both ends, in one process."""

    def __init__(self, threads, name="a>b#0/0"):
        self.source, self.destination = (GlooPair(2, rank, name) for rank in (0, 1))
        self._threads = threads

    def copy(self, tensor):
        """What arrives of it."""
        arrived = torch.zeros_like(tensor)
        sent = self._threads.submit(self.send, tensor)
        self.receive(arrived)
        sent.result(WAIT_S)
        return arrived

    def send(self, tensor):
        self.source.send([tensor], to(1))

    def receive(self, tensor):
        self.destination.recv([tensor], of(0))

    def destroy(self):
        for end in (self.source, self.destination):
            end.destroy_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_bytes_arrive_in_order(threads, dtype):
    pair = Pair(threads)
    for size in (1, 100_000, 3):
        tensor = torch.arange(size).to(dtype)
        assert torch.equal(pair.copy(tensor), tensor)
    pair.destroy()


def test_pairs_do_not_wait_for_each_other(threads):
    """One whose other end is late does not hold up the one beside it."""
    late, prompt = Pair(threads, "late"), Pair(threads, "prompt")
    word = torch.ones(4)
    waiting = threads.submit(late.send, word)
    assert torch.equal(prompt.copy(word), word)
    assert not waiting.done()
    late.receive(torch.zeros(4))
    waiting.result(WAIT_S)


def test_an_end_that_never_comes_is_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(pair, "PAIR_TIMEOUT_S", 0.05)
    alone = GlooPair(2, 1, "alone")
    with pytest.raises(TimeoutError, match="alone did not show up"):
        alone.recv([torch.zeros(1)], of(0))


def test_a_peer_that_takes_nothing_in_is_given_up(threads, monkeypatch):
    monkeypatch.setattr(gloo, "PAIR_TIMEOUT_S", 1.0)
    pair = Pair(threads)
    pair.copy(torch.ones(1))
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        pair.receive(torch.zeros(1))  # nobody sends
    assert time.monotonic() - started < WAIT_S


def test_the_address_is_forgotten_with_the_pair(threads, store):
    pair = Pair(threads)
    pair.copy(torch.ones(1))
    assert len(store) == 1
    pair.destroy()
    assert store == {}


def test_leaving_an_unknown_group_is_nothing():
    transport.leave("nobody joined it")


def test_a_pair_only_sends_and_receives():
    pair = GlooPair(2, 0, "g")
    for unsupported in (pair.allreduce, pair.barrier, pair.allgather):
        with pytest.raises(NotImplementedError):
            unsupported(None)
