"""Which process does what, by its title."""

import subprocess
import sys

import pytest

from load_tests.chaos.processes import INGRESS, REPLICA, Processes, Usage, actors, role_of
from load_tests.servers import ServerFailed


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::ServeReplica:llama:LLMReplica", REPLICA),
        ("ray::ServeReplica:llama:Ingress.initialize_and_get_metadata", INGRESS),
        ("ray::ServeController.listen_for_change", "ray::ServeController"),
        ("ray::IDLE", "ray::IDLE"),
        ("gcs_server", "gcs_server"),
        ("log_monitor.py", "log_monitor.py"),
    ],
)
def test_a_role_is_the_same_whatever_a_process_is_doing(title, role):
    assert role_of(title) == role


def test_actors_are_all_that_ray_runs_but_idle_workers():
    usage = {REPLICA: Usage(3), "ray::ServeController": Usage(1), "ray::IDLE": Usage(2)}
    assert actors({**usage, "raylet": Usage(1)}) == 4


def test_usage_is_summed_over_a_role():
    assert Usage(1, 10.0, 5, 2, 1) + Usage(1, 20.0, 5, 2, 0) == Usage(2, 30.0, 10, 4, 1)


def test_a_server_without_instances_has_none():
    waiting = [sys.executable, "-c", "input()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as server:
        here = Processes(server.pid)
        assert here.instances() == {}
        with pytest.raises(ServerFailed, match="no process of x"):
            here.instance("x")
        server.kill()
