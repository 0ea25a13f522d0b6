"""Tokens from a replica to ingresses, over real sockets on this machine."""

import asyncio

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from deployments import outbox as module
from deployments.outbox import Inbox, Outbox, Ownership, Step
from migration.snapshot import MigrationRecord


@pytest.fixture
def outbox():
    box = Outbox("replica-1")
    yield box
    box.close()


@pytest.fixture
async def inbox():
    box = Inbox("127.0.0.1")
    yield box
    box.close()


@pytest.fixture
async def other_inbox():
    box = Inbox("127.0.0.1")
    yield box
    box.close()


def step(**tokens: list[int]) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[EngineCoreOutput(name, ids) for name, ids in tokens.items()])


def last(name: str, *tokens: int) -> EngineCoreOutputs:
    output = EngineCoreOutput(name, list(tokens), finish_reason=FinishReason.LENGTH)
    return EngineCoreOutputs(outputs=[output])


async def received(inbox: Inbox) -> Step | Ownership | MigrationRecord:
    async with asyncio.timeout(5):
        return await inbox.receive()


async def first_of(inbox: Inbox) -> list[int]:
    """The indices of the next step's first tokens, past any other message."""
    while not isinstance(message := await received(inbox), Step):
        pass
    return message.first


async def test_a_step_arrives_with_its_tokens_and_its_replica(outbox, inbox):
    client = outbox.client_index(inbox.address)
    outbox.send_step(client, step(r1=[5, 6], r2=[7]))
    message = await received(inbox)
    assert isinstance(message, Step)
    assert (message.replica_id, message.first) == ("replica-1", [0, 0])
    assert [o.new_token_ids for o in message.outputs.outputs] == [[5, 6], [7]]


async def test_token_indices_continue_across_steps(outbox, inbox):
    client = outbox.client_index(inbox.address)
    for tokens in ([1], [2, 3], [], [4]):
        outbox.send_step(client, step(r1=tokens))
    assert [await first_of(inbox) for _ in range(4)] == [[0], [1], [3], [3]]


async def test_each_request_has_indices_of_its_own(outbox, inbox):
    client = outbox.client_index(inbox.address)
    outbox.send_step(client, step(r1=[1, 2]))
    outbox.send_step(client, step(r2=[1], r1=[3]))
    assert [await first_of(inbox) for _ in range(2)] == [[0], [0, 2]]


async def test_a_request_that_moved_here_continues_its_indices_and_names_its_owner(outbox, inbox):
    client = outbox.client_index(inbox.address)
    outbox.expect(client, "r1", 40)
    outbox.send_step(client, step(r1=[1]))
    outbox.send_step(client, step(r1=[2]))
    assert await received(inbox) == Ownership("replica-1", "r1", 40)
    assert [await first_of(inbox) for _ in range(2)] == [[40], [41]]


async def test_the_owner_is_known_before_the_first_token(outbox, inbox):
    client = outbox.client_index(inbox.address)
    outbox.expect(client, "r1", 0)
    outbox.send_step(client, step(r1=[1]))
    assert isinstance(await received(inbox), Ownership)
    assert isinstance(await received(inbox), Step)


async def test_a_finished_request_is_forgotten(outbox, inbox):
    client = outbox.client_index(inbox.address)
    outbox.send_step(client, step(r1=[1]))
    outbox.send_step(client, last("r1", 2))
    outbox.send_step(client, step(r1=[1]))
    assert [await first_of(inbox) for _ in range(3)] == [[0], [1], [0]]


async def test_a_request_that_left_is_forgotten(outbox, inbox):
    client = outbox.client_index(inbox.address)
    outbox.send_step(client, step(r1=[1, 2]))
    outbox.forget(client, "r1")
    outbox.send_step(client, step(r1=[1]))
    assert [await first_of(inbox) for _ in range(2)] == [[0], [0]]


def test_nothing_is_kept_for_requests_that_ended(outbox):
    client = outbox.client_index("tcp://127.0.0.1:1")
    outbox.expect(client, "finishes", 0)
    outbox.expect(client, "leaves", 0)
    outbox.send_step(client, last("finishes", 1))
    outbox.forget(client, "leaves")
    assert outbox._by_index[client].first == {}


async def test_two_ingresses_get_their_own_steps_only(outbox, inbox, other_inbox):
    one, other = outbox.client_index(inbox.address), outbox.client_index(other_inbox.address)
    assert one != other
    outbox.send_step(one, step(r1=[1]))
    outbox.send_step(other, step(r2=[2]))
    outbox.send_step(one, step(r1=[3]))
    here = [await received(inbox) for _ in range(2)]
    assert [m.outputs.outputs[0].new_token_ids for m in here] == [[1], [3]]
    there = await received(other_inbox)
    assert there.outputs.outputs[0].request_id == "r2"


async def test_two_replicas_reach_one_ingress(outbox, inbox):
    second = Outbox("replica-2")
    for box in (outbox, second):
        box.send_step(box.client_index(inbox.address), step(r1=[1]))
    assert {(await received(inbox)).replica_id for _ in range(2)} == {"replica-1", "replica-2"}
    second.close()


def test_an_ingress_keeps_its_index(outbox):
    assert outbox.client_index("tcp://127.0.0.1:1") == outbox.client_index("tcp://127.0.0.1:1")


async def test_a_record_arrives_as_it_was(outbox, inbox):
    record = MigrationRecord("r1", "a", "b", "drain", "aborted", "why", 1, 2, 3, 4.5)
    outbox.send_record(inbox.address, record)
    assert await received(inbox) == record


async def test_statistics_and_finish_reasons_survive_the_way(outbox, inbox):
    outbox.send_step(outbox.client_index(inbox.address), last("r1", 9))
    (output,) = (await received(inbox)).outputs.outputs
    assert output.finish_reason is FinishReason.LENGTH


def test_an_ingress_nobody_knows_gets_nothing(outbox):
    outbox.send_step(99, step(r1=[1]))
    outbox.forget(99, "r1")


def test_an_ingress_that_is_gone_does_not_block_the_step_thread(outbox):
    client = outbox.client_index("tcp://127.0.0.1:1")
    for _ in range(2000):
        outbox.send_step(client, step(r1=[1]))


def test_the_ingress_silent_longest_makes_room(outbox, monkeypatch):
    monkeypatch.setattr(module, "MAX_INGRESSES", 2)
    first, second, third = (f"tcp://127.0.0.1:{port}" for port in (1, 2, 3))
    outbox.client_index(first)
    outbox.client_index(second)
    outbox.client_index(first)
    outbox.client_index(third)
    assert list(outbox._ingresses) == [first, third]
    assert len(outbox._by_index) == 2
