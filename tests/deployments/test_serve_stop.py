"""How a replica learns that Serve stops it, in virtual time."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.serve._private.replica import Replica as ServeReplica

from deployments import serve_stop
from deployments.serve_stop import POLL_S, watch
from tests.virtual import virtually


class Replica:
    """A worker process as Ray has it, with Serve's replica as its actor."""

    actor_id = "me"
    mode = None  # Ray's logging asks for it

    def __init__(self):
        self.serve = SimpleNamespace(_shutting_down=False)
        self.actors = {"me": SimpleNamespace(_replica_impl=self.serve), "other": None}
        self.told = 0

    def on_stop(self):
        self.told += 1


@pytest.fixture
def replica(monkeypatch):
    here = Replica()
    monkeypatch.setattr(serve_stop.worker, "global_worker", here)
    return here


@virtually
async def test_a_replica_is_told_once_and_at_once_that_serve_stops_it(replica):
    watching = asyncio.create_task(watch(replica.on_stop))
    await asyncio.sleep(100 * POLL_S)
    assert replica.told == 0
    replica.serve._shutting_down = True
    await asyncio.sleep(1.5 * POLL_S)
    assert replica.told == 1
    assert watching.done()


@virtually
async def test_where_another_ray_has_no_such_flag_one_line_says_so(replica, caplog):
    del replica.serve._shutting_down
    await watch(replica.on_stop)
    assert replica.told == 0
    (line,) = (each.getMessage() for each in caplog.records)
    assert "cannot be seen" in line
    assert "_shutting_down" in line


def test_this_ray_has_the_flag():

    assert "_shutting_down" in ServeReplica._perform_graceful_shutdown.__code__.co_names
