from dataclasses import replace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray.exceptions import ActorUnavailableError

from app.admin import admin_router
from app.entry import Entry
from app.journal import Journal
from app.peers import Peers, shown_by
from deployments.engine_loop import EngineDead
from deployments.messages import FleetView
from deployments.pinned import ReplicaGone
from deployments.policy.load import InstanceLoad
from migration.snapshot import CannotMove, MigrationRecord, Submission
from tests.app.fakes import FakeIngresses
from tests.fakes import FakeHandle

LOADS = (
    InstanceLoad(
        "a",
        "running",
        blocks_total=100,
        blocks_used=90,
        running=3,
        waiting=2,
        head_of_line_blocks=12,
        freeness=3.3,
        migrating_in=1,
        emulation_drift=0.0123456789,
        due_blocks=15,
        headroom_blocks={"high": 100},
    ),
    InstanceLoad("b", "draining", blocks_total=100, freeness=float("-inf")),
    InstanceLoad("c", "running", blocks_total=100, blocks_used=10, running=1, freeness=90.0),
)


def record(outcome="completed", destination="c", detail=""):
    return MigrationRecord("r1", "a", destination, "admin", outcome, detail, 1, 4, 4096, 2.5)


def opened(journal, request_id, public_id, replica_id=None):
    """A new request of an ingress, at a replica or waiting for one."""
    entry = Entry(
        Submission(request_id, public_id, b"request", 12, "normal", "tcp://ingress"),
        (f"cmpl-{public_id}",),
    )
    if replica_id is not None:
        entry.owned_by(replica_id, 0)
    journal.open(entry)
    return entry


def end(journal, entry):
    entry.state = "finished"
    journal.close(entry)


class World:
    """A fleet of three replicas, one request on `a`, and all calls that were made.

    `other`: the journal of another ingress, while that one answers.
    """

    def __init__(self, api_key=None):
        self.calls = []
        self.scheduler_answers = True
        self.undrain = None
        self.dead = set()
        self.migrate = lambda destination: record(destination=destination)
        self.journal, self.other = Journal(1000), Journal(1000)
        self.other_answers = True
        self.entry = opened(self.journal, "r1", "mine", "a")
        replicas = FakeHandle(
            {
                "migrate_out": lambda at, rid, to: (
                    self.note("migrate", at, rid),
                    self.migrate(to),
                )[1],
                "set_draining": lambda at, on: self.note("draining", at, on) or self.undrain,
                "load": self._load,
            }
        )
        scheduler = FakeHandle({"view": self._view})
        app = FastAPI()
        client = SimpleNamespace(journal=self.journal, recoveries=2)
        self.ingresses = FakeIngresses(
            shown=[lambda _, name: shown_by(self._other(), name)],
            recoveries=[lambda _: self._other() and 3],
        )
        peers = Peers(self.ingresses, "me")
        app.include_router(admin_router(client, peers, replicas, scheduler, api_key))
        self.http = TestClient(app)

    def note(self, *call):
        self.calls.append(call)

    def _view(self, _):
        if not self.scheduler_answers:
            raise TimeoutError
        return FleetView(LOADS, {"completed": 7, "refused": 1})

    def _load(self, replica_id):
        if replica_id in self.dead:
            raise EngineDead("the step thread ended")
        return next(load for load in LOADS if load.replica_id == replica_id)

    def _other(self):
        if not self.other_answers:
            raise ActorUnavailableError("Actor is unavailable.", None)
        return self.other

    def shown(self):
        return [each["request_id"] for each in self.http.get("/fleet/requests").json()]

    def move(self, request_id="mine", destination=None):
        body = {"request_id": request_id, "destination": destination}
        return self.http.post("/fleet/migrate", json=body)


@pytest.fixture
def world():
    return World()


def test_the_overview_shows_all_instances_and_the_migrations(world):
    answer = world.http.get("/fleet").json()

    assert [(r["replica_id"], r["state"], r["freeness"]) for r in answer["replicas"]] == [
        ("a", "running", 3.3),
        ("b", "draining", None),
        ("c", "running", 90.0),
    ]
    assert answer["scheduler"] == "up"
    assert answer["migrations"] == {"completed": 7, "aborted": 0, "refused": 1}


def test_the_overview_shows_what_an_instance_tells_about_itself(world):
    busy, *_ = world.http.get("/fleet").json()["replicas"]

    assert busy == {
        "replica_id": "a",
        "state": "running",
        "freeness": 3.3,
        "blocks_total": 100,
        "blocks_used": 90,
        "head_of_line_blocks": 12,
        "due_blocks": 15,
        "headroom_blocks": {"high": 100},
        "running": 3,
        "waiting": 2,
        "migrating_in": 1,
        "migrating_out": 0,
        "emulation_drift": 0.012346,
        "fingerprint": "",
    }


def test_without_the_scheduler_the_replicas_are_asked(world):
    world.http.get("/fleet")
    world.scheduler_answers = False

    answer = world.http.get("/fleet").json()

    assert answer["scheduler"] == "bypassed"
    assert [r["replica_id"] for r in answer["replicas"]] == ["a", "b", "c"]


def test_without_the_scheduler_a_dead_engine_is_left_out(world):
    world.http.get("/fleet")
    world.scheduler_answers, world.dead = False, {"c"}
    shown = world.http.get("/fleet").json()["replicas"]
    assert [each["replica_id"] for each in shown] == ["a", "b"]


def test_a_request_is_found_by_each_of_its_ids(world):
    for name in ("mine", "cmpl-mine"):
        answer = world.http.get(f"/fleet/requests/{name}").json()
        assert answer["request_id"] == "mine"
        assert answer["replicas"] == ["a"]
    assert world.http.get("/fleet/requests/other").status_code == 404
    assert world.shown() == ["mine"]


def test_the_requests_of_all_ingresses_are_shown_those_that_run_first(world):
    end(world.journal, opened(world.journal, "r0", "over", "a"))
    opened(world.other, "r2", "theirs", "b")
    end(world.other, opened(world.other, "r3", "theirs-over", "b"))

    assert world.shown() == ["mine", "theirs", "over", "theirs-over"]


def test_a_request_is_found_at_whichever_ingress_it_is(world):
    opened(world.other, "r2", "theirs", "b")

    for name in ("theirs", "cmpl-theirs"):
        assert world.http.get(f"/fleet/requests/{name}").json()["replicas"] == ["b"]
    assert world.http.get("/fleet/requests/other").status_code == 404


def test_a_request_that_runs_wins_over_one_of_its_name_that_ended(world):
    end(world.journal, world.entry)
    assert world.http.get("/fleet/requests/mine").json()["state"] == "finished"

    opened(world.other, "r2", "mine", "b")

    assert world.http.get("/fleet/requests/mine").json()["state"] == "waiting"
    world.move()
    assert world.calls == [("migrate", "b", "r2")]


def test_nobody_else_is_asked_about_a_request_that_runs_here(world):
    world.http.get("/fleet/requests/mine")
    world.move()

    assert world.ingresses.asked == []


def test_without_the_other_ingresses_this_one_tells_what_it_knows(world):
    opened(world.other, "r2", "theirs", "b")
    world.other_answers = False

    assert world.shown() == ["mine"]
    assert world.http.get("/fleet/requests/mine").status_code == 200
    assert world.http.get("/fleet/requests/theirs").status_code == 404
    assert world.http.get("/fleet").json()["recoveries"] == 2


def test_recoveries_are_those_of_all_ingresses(world):
    assert world.http.get("/fleet").json()["recoveries"] == 5


def test_a_move_goes_to_the_replica_that_has_the_request(world):
    answer = world.move(destination="c")

    assert answer.status_code == 200
    assert answer.json() | {"at": 0} == {
        "from": "a",
        "to": "c",
        "reason": "admin",
        "outcome": "completed",
        "detail": "",
        "stages": 1,
        "blocks": 4,
        "bytes": 4096,
        "downtime_ms": 2.5,
        "recomputed_tokens": 0,
        "at": 0,
    }
    assert world.calls == [("migrate", "a", "r1")]


def test_a_request_of_another_ingress_moves_as_well(world):
    opened(world.other, "r2", "theirs", "b")

    assert world.move("theirs", "c").json()["outcome"] == "completed"
    assert world.calls == [("migrate", "b", "r2")]


def test_without_a_destination_the_freest_other_running_replica_is_taken(world):
    assert world.move().json()["to"] == "c"


@pytest.mark.parametrize(
    ("request_id", "destination", "status", "message"),
    [
        ("nobody", None, 404, "no request 'nobody' is running or ended lately"),
        ("mine", "z", 404, "no replica 'z'"),
    ],
)
def test_what_is_not_there_is_404(world, request_id, destination, status, message):
    answer = world.move(request_id, destination)

    assert (answer.status_code, answer.json()["detail"]) == (status, message)
    assert world.calls == []


def test_an_ended_request_is_409(world):
    world.entry.state = "finished"
    end(world.other, opened(world.other, "r2", "theirs", "b"))

    assert world.move().json()["detail"] == "request 'mine' has ended (finished)"
    assert world.move("theirs").json()["detail"] == "request 'theirs' has ended (finished)"


def test_a_request_that_waits_for_a_replica_is_409(world):
    opened(world.journal, "r2", "new")

    answer = world.move("new")

    assert (answer.status_code, answer.json()["detail"]) == (
        409,
        "request 'new' is not on a replica yet",
    )


def test_a_refusal_and_an_impossible_move_are_409_with_the_reason(world):
    def impossible(destination):
        raise CannotMove("the request is already on the move")

    world.migrate = lambda destination: record("refused", destination, "c refuses: no room")
    refused = world.move()
    world.migrate = impossible
    cannot = world.move()

    assert (refused.status_code, refused.json()["detail"]) == (409, "c refuses: no room")
    assert cannot.json()["detail"] == "the request is already on the move"


def test_a_lost_source_is_409(world):
    def gone(destination):
        raise ReplicaGone("a")

    world.migrate = gone

    assert world.move().json()["detail"] == "a does not answer"


def test_drain_and_undrain_tell_the_replica(world):
    for verb in ("drain", "undrain"):
        assert world.http.post(f"/fleet/{verb}", json={"replica_id": "c"}).status_code == 200
    assert world.http.post("/fleet/drain", json={"replica_id": "z"}).status_code == 404

    assert world.calls == [("draining", "c", True), ("draining", "c", False)]


def test_a_replica_that_serve_stops_is_not_taken_back(world):
    world.undrain = CannotMove("Serve stops c")

    answer = world.http.post("/fleet/undrain", json={"replica_id": "c"})

    assert (answer.status_code, answer.json()["detail"]) == (409, "Serve stops c")


def test_a_request_is_moved_by_hand_to_an_instance_that_runs_its_model(world):
    world.entry.submission = replace(world.entry.submission, fingerprint="13b")

    assert world.move().json()["detail"] == "no other replica takes requests"


def test_a_key_is_asked_for_where_one_is_set():
    http = World(api_key="secret").http

    assert http.get("/fleet").status_code == 401
    assert http.get("/fleet", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert http.get("/fleet", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_an_unknown_field_is_refused(world):
    body = {"request_id": "mine", "destintion": "c"}

    assert world.http.post("/fleet/migrate", json=body).status_code == 422
