"""The scenarios of `python -m load_tests.chaos`: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

import msgspec

from deployments.emulated.profile import load_profile
from load_tests.baselines import merge
from load_tests.chaos.faults import Kind
from load_tests.chaos.processes import INGRESS, REPLICA
from load_tests.chaos.workload import MODEL, Workload
from load_tests.servers import SMALL_ENGINE, application

HANG_S = 5.0

ARGS: Mapping[str, Any] = {
    "model": {"model_id": MODEL, "model_source": "models/tiny-llama"},
    "recovery": {"hang_s": HANG_S},
}

EMULATED = merge(
    ARGS,
    {
        # A move brings all of its blocks, and what was lost is computed again.
        "model": {"engine_kwargs": {"enable_prefix_caching": False, "max_model_len": 2048}},
    },
)
BLOCKS, SLOWER = 512, 4
"""Of the emulated A10: so little memory that a burst fills it, and a link so many times as slow as
in the paper that a move takes long enough to be hit.
"""

VLLM = merge(ARGS, {"model": {"engine_kwargs": SMALL_ENGINE}})


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fleet, its users, and what happens to it.

    It lasts until so many streams have ended, so many processes were killed and so many minutes
    have passed. `deck`: the faults, about one in `every_s`, each only while as many instances as
    `survivors` are left by it. `calm`: the same number of streams is run without faults first, to
    compare. `loses`: which streams may fail; `flat`: whether memory and the like may not grow.
    """

    name: str
    about: str
    workload: Workload
    instances: int
    deck: tuple[Kind, ...]
    every_s: float
    users: int
    args: Mapping[str, Any]
    deployments: tuple[Mapping[str, Any], ...] = ()
    survivors: int = 2
    streams: int = 0
    kills: int = 0
    minutes: float = 0.0
    calm: bool = False
    loses: Literal["none", "some", "of the ingress"] = "none"
    flat: bool = False

    def scaled(self, streams: int | None, minutes: float | None) -> "Scenario":
        """With another number of streams, and kills in proportion, or other minutes."""
        kills = self.kills
        if streams is not None and self.streams:
            kills = ceil(self.kills * streams / self.streams)
        return replace(
            self,
            streams=self.streams if streams is None else streams,
            kills=kills,
            minutes=self.minutes if minutes is None else minutes,
        )

    def yaml(self, folder: Path) -> dict[str, Any]:
        """The content of its fleet's Serve YAML file. The emulated GPU is a file in `folder`."""
        args = merge(self.args, {"replicas": self.instances})
        if self.workload == "emulated":
            args["engine"] = {"emulated": {"profile": str(_profile(folder))}}
        content = application(args)
        if self.deployments:
            content["applications"][0]["deployments"] = list(self.deployments)
        return content


def _profile(folder: Path) -> Path:
    a10 = load_profile("a10-llama-7b")
    small = msgspec.structs.replace(a10, blocks=BLOCKS, copy_token_s=SLOWER * a10.copy_token_s)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small-a10.json"
    file.write_bytes(msgspec.json.encode(small))
    return file.absolute()


_ALL = (
    Scenario(
        name="kills-emulated",
        about="instances killed, both ends of moves too, stopped and filled; the Scheduler killed",
        workload="emulated",
        instances=5,
        deck=("kill", "kill", "source", "source", "destination", "destination", "both ends",
              "short hang", "long hang", "burst", "scheduler"),
        every_s=13,
        users=24,
        args=EMULATED,
        streams=1000,
        kills=27,
    ),
    Scenario(
        name="kills-vllm",
        about="the same with real engines: greedy, seeded, penalties, structured output",
        workload="vllm",
        instances=3,
        deck=("kill", "source", "destination", "both ends", "long hang", "burst", "scheduler"),
        every_s=15,
        users=12,
        args=VLLM,
        deployments=({"name": REPLICA, "ray_actor_options": {"num_cpus": 0.5}},),
        survivors=1,
        streams=300,
        kills=12,
    ),
    Scenario(
        name="control",
        about="recovery switched off: streams are lost with their instances",
        workload="emulated",
        instances=3,
        deck=("kill", "source", "destination"),
        every_s=15,
        users=12,
        args=merge(EMULATED, {"recovery": {"max_recoveries": 0}}),
        survivors=1,
        streams=100,
        kills=3,
        loses="some",
    ),
    Scenario(
        name="scheduler",
        about="the Scheduler killed every ten seconds, beside the undisturbed fleet",
        workload="emulated",
        instances=3,
        deck=("scheduler",),
        every_s=10,
        users=12,
        args=EMULATED,
        streams=200,
        kills=12,
        calm=True,
    ),
    Scenario(
        name="ingress",
        about="one of two ingresses killed: its streams break, no others",
        workload="emulated",
        instances=3,
        deck=("ingress",),
        every_s=25,
        users=16,
        args=EMULATED,
        deployments=({"name": INGRESS, "num_replicas": 2},),
        streams=200,
        kills=4,
        loses="of the ingress",
    ),
    Scenario(
        name="soak",
        about="half an hour of moves, and a fault a minute: what it takes stays flat",
        workload="emulated",
        instances=4,
        deck=("kill", "source", "destination", "both ends", "short hang", "long hang", "burst"),
        every_s=60,
        users=16,
        args=EMULATED,
        minutes=30,
        flat=True,
    ),
)  # fmt: skip

SCENARIOS = {scenario.name: scenario for scenario in _ALL}
