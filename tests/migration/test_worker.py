"""KV blocks and sampler state of one rank, without an engine: the model runner is a fake."""

import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from vllm.sampling_params import SamplingParams

from migration import transport, worker
from migration.worker import MigrationWorker

BLOCKS, LAYERS, WAIT_S = 12, 3, 5.0
LAYOUTS = {"blocks first": (BLOCKS, 2, 4, 8), "blocks second": (2, BLOCKS, 4, 8)}
BLOCK_BYTES = LAYERS * 2 * 4 * 8 * 4
"""Of all layers, in float32."""

FROM, INTO = [7, 2, 5, 11, 0], [1, 9, 3, 4, 10]


class Wire:
    """The transport in one process: what one end sends, the other one's queue has."""

    def __init__(self):
        self.joined, self.left = [], []
        self._queues = {}

    def join(self, group, rank, backend, device):
        self.joined.append((group, rank, backend))

    def leave(self, group):
        self.left.append(group)

    def send(self, group, tensor):
        assert tensor.is_contiguous()
        self._queue(group).put(tensor.clone())

    def receive(self, group, tensor):
        assert tensor.is_contiguous()
        tensor.copy_(self._queue(group).get(timeout=WAIT_S))

    def chunks(self, group):
        """How many are under way."""
        return self._queue(group).qsize()

    def _queue(self, group):
        return self._queues.setdefault(group, queue.Queue())


@pytest.fixture
def wire(monkeypatch):
    wire = Wire()
    for name in ("join", "leave", "send", "receive"):
        monkeypatch.setattr(transport, name, getattr(wire, name))
    return wire


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture
def make(monkeypatch):
    """A worker of one rank whose KV cache holds random numbers of its own."""
    monkeypatch.setattr(worker, "hide_generators_of_unfinished_prefills", lambda runner: None)
    made = []

    def make(rank=0, shape=LAYOUTS["blocks first"], threads=2):
        one = MigrationWorker()
        one.rank = rank
        random = torch.Generator().manual_seed(len(made))
        one.model_runner = SimpleNamespace(
            kv_caches=[torch.rand(shape, generator=random) for _ in range(LAYERS)],
            kv_cache_config=SimpleNamespace(num_blocks=BLOCKS),
            requests={},
            device=torch.device("cpu"),
        )
        one.mig_prepare(threads)
        made.append(one)
        return one

    yield make
    for one in made:
        one._mig_threads.shutdown()


@pytest.fixture
def hold():
    """What a job waits for; open at the end of a test at the latest, so that its thread ends."""
    hold = threading.Event()
    yield hold
    hold.set()


def blocks(one, ids):
    """Contents of these blocks of every layer."""
    kv = one.model_runner.kv_caches
    return torch.stack([layer.movedim(layer.shape.index(BLOCKS), 0)[ids] for layer in kv])


def wait(one, job):
    """The result of a job, asked for as Links does."""
    deadline = time.monotonic() + WAIT_S
    while (result := one.mig_poll(job)) is None:
        assert time.monotonic() < deadline, f"{job} does not end"
        time.sleep(0.001)
    return result


class TestBlocks:
    def test_every_rank_sends_its_own_to_the_same_rank(self, make, wire, layout):
        source, destination = ([make(rank, layout) for rank in (0, 1)] for _ in range(2))
        others = [block for block in range(BLOCKS) if block not in INTO]
        before = [blocks(one, others) for one in destination]

        for one in source:
            one.mig_start("out", "mig_send", "g", FROM)
        for one in reversed(destination):
            one.mig_start("in", "mig_receive", "g", INTO)

        assert [wait(one, "out") for one in source] == [len(FROM) * BLOCK_BYTES] * 2
        assert [wait(one, "in") for one in destination] == [len(FROM) * BLOCK_BYTES] * 2
        for one, other, untouched in zip(source, destination, before, strict=True):
            assert torch.equal(blocks(other, INTO), blocks(one, FROM))
            assert torch.equal(blocks(other, others), untouched)
        assert not torch.equal(*(blocks(one, INTO) for one in destination))

    @pytest.mark.parametrize(
        ("chunk_bytes", "chunks"), [(2 * BLOCK_BYTES, 3), (BLOCK_BYTES, 5), (1, 5), (1 << 30, 1)]
    )
    def test_many_go_in_chunks(self, make, wire, layout, monkeypatch, chunk_bytes, chunks):
        monkeypatch.setattr(worker, "CHUNK_BYTES", chunk_bytes)
        source, destination = make(shape=layout), make(shape=layout)

        source.mig_send("g", FROM)
        assert wire.chunks("g/0") == chunks
        destination.mig_receive("g", INTO)

        assert wire.chunks("g/0") == 0
        assert torch.equal(blocks(destination, INTO), blocks(source, FROM))

    def test_none_is_no_transfer(self, make, wire):
        one = make()
        assert one.mig_send("g", []) == one.mig_receive("g", []) == 0
        assert wire.chunks("g/0") == 0


def test_a_model_without_a_kv_cache_is_refused_in_one_line():
    one = MigrationWorker()
    one.model_runner = SimpleNamespace(kv_caches=[])
    with pytest.raises(ValueError, match="the model has no KV cache"):
        one.mig_prepare(1)


class TestGroups:
    def test_each_rank_has_its_own(self, make, wire):
        for rank in (0, 1):
            one = make(rank)
            assert one.mig_join("a>b#0", 1, "auto") == one.mig_leave("a>b#0") == 0
        assert wire.joined == [("a>b#0/0", 1, "gloo"), ("a>b#0/1", 1, "gloo")]
        assert wire.left == ["a>b#0/0", "a>b#0/1"]

    @pytest.mark.parametrize(
        ("device", "wanted", "backend"),
        [
            ("cpu", "auto", "gloo"),
            ("cuda:1", "auto", "nccl"),
            ("cuda", "gloo", "gloo"),
            ("cpu", "nccl", "nccl"),
        ],
    )
    def test_the_backend_is_that_of_the_kv_caches_unless_one_is_wanted(
        self, device, wanted, backend
    ):
        assert transport.backend_for(torch.device(device), wanted) == backend


class TestJobs:
    def test_a_copy_that_blocks_holds_nobody_up(self, make, wire):
        source, destination = make(), make()

        destination.mig_start("in", "mig_receive", "g", INTO)
        assert destination.mig_poll("in") is None
        source.mig_send("g", FROM)

        assert wait(destination, "in") == len(FROM) * BLOCK_BYTES
        assert destination.mig_poll("in") == len(FROM) * BLOCK_BYTES, "asked again"

    def test_two_run_at_once(self, make, wire):
        one, two, there = make(), make(), make()
        there.mig_start("first", "mig_receive", "a", INTO)
        there.mig_start("second", "mig_receive", "b", [0])
        two.mig_send("b", [1])
        assert wait(there, "second") == BLOCK_BYTES
        assert there.mig_poll("first") is None
        one.mig_send("a", FROM)
        assert wait(there, "first") == len(FROM) * BLOCK_BYTES

    def test_an_error_is_told_as_text(self, make, monkeypatch):
        def fail(group, tensor):
            raise RuntimeError("the peer died")

        monkeypatch.setattr(transport, "send", fail)
        one = make()
        one.mig_start("out", "mig_send", "g", FROM)
        assert wait(one, "out") == "RuntimeError: the peer died"

    def test_not_all_are_remembered(self, make, wire, hold, monkeypatch):
        monkeypatch.setattr(worker, "JOBS_REMEMBERED", 4)
        monkeypatch.setattr(transport, "join", lambda *_: hold.wait(WAIT_S))
        one = make(threads=1)
        for number in range(6):
            one.mig_start(f"job {number}", "mig_join", f"g{number}", 0, "gloo")
        assert list(one._mig_jobs) == [f"job {number}" for number in range(2, 6)]
        assert one.mig_poll("job 5") is None


class TestGenerators:
    SEED = 3

    def seeded(self, make, draws):
        """A worker on which a seeded request has drawn so often."""
        one = make()
        generator = torch.Generator().manual_seed(self.SEED)
        for _ in range(draws):
            torch.randint(0, 2**31, (1,), generator=generator)
        one.model_runner.requests["r"] = SimpleNamespace(generator=generator)
        return one

    def request(self, **sampling):
        return SimpleNamespace(
            req_id="r",
            prompt_token_ids=[1, 2],
            sampling_params=SamplingParams(**sampling),
            num_computed_tokens=4,
            lora_request=None,
        )

    def test_one_goes_on_as_it_would_have(self, make):
        here, there = self.seeded(make, draws=5), make()

        state = here.mig_generator("r")
        there.mig_seed(self.request(seed=self.SEED), [7, 8, 9], state)

        theirs = here.model_runner.requests["r"].generator
        ours = there.model_runner.requests["r"]
        draws = [torch.rand(20, generator=one) for one in (ours.generator, theirs)]
        assert torch.equal(*draws)
        assert ours.output_token_ids == [7, 8, 9]
        assert ours.num_computed_tokens == 4

    def test_without_a_state_it_has_drawn_once_for_each_token(self, make):
        here, there = self.seeded(make, draws=3), make()
        there.mig_seed(self.request(seed=self.SEED), [7, 8, 9], None)
        assert there.mig_generator("r") == here.mig_generator("r")

    def test_an_unseeded_request_has_none(self, make):
        there = make()
        there.mig_seed(self.request(), [7], None)
        assert there.model_runner.requests["r"].generator is None
        assert there.mig_generator("r") is None

    def test_a_greedy_request_has_none_whatever_its_seed(self, make):
        """As in vLLM; on a GPU it would keep the whole batch from the faster sampler."""
        there = make()
        there.mig_seed(self.request(seed=self.SEED, temperature=0.0), [7], None)
        assert there.mig_generator("r") is None

    def test_positions_in_three_dimensions_are_made_for_it_as_for_a_new_one(self, make):
        """Of Qwen-VL and its like, text-only requests included."""
        there, made = make(), []
        there.model_runner.uses_mrope = True
        there.model_runner._init_mrope_positions = made.append
        there.mig_seed(self.request(), [7], None)
        assert made == [there.model_runner.requests["r"]]

    def test_the_v2_runner_keeps_none(self, make):
        one = make()
        del one.model_runner.requests
        one.mig_seed(self.request(seed=self.SEED), [7], None)
        assert one.mig_generator("r") is None
