"""The processes of a fleet: which one is which instance, and what each takes of the machine."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from deployments.messages import INGRESS, REPLICA, SCHEDULER
from load_tests.cpu import title
from load_tests.servers import ServerFailed

_DEPLOYMENT = re.compile(r"ray::ServeReplica:\w+:(\w+)(.*)")
_UP = re.compile(r"instance (\w+) up")


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of one role take, all in all. `sockets`: TCP, of all states."""

    processes: int = 0
    rss_mib: float = 0.0
    fds: int = 0
    threads: int = 0
    sockets: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.processes + other.processes,
            self.rss_mib + other.rss_mib,
            self.fds + other.fds,
            self.threads + other.threads,
            self.sockets + other.sockets,
        )


class Processes:
    """Those under a server's `pid`, and no others."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._instances: dict[psutil.Process, str] = {}

    def instances(self) -> dict[str, psutil.Process]:
        """The instances that are up, by replica id."""
        up = {process: self._instance(process) for process in self.of(REPLICA)}
        self._instances = {process: name for process, name in up.items() if name}
        return {name: process for process, name in self._instances.items()}

    def instance(self, replica_id: str) -> psutil.Process:
        """One of them. Raises ServerFailed where it is not up."""
        up = self.instances()
        if replica_id not in up:
            raise ServerFailed(f"no process of {replica_id}, only of {', '.join(up) or 'none'}")
        return up[replica_id]

    def of(self, deployment: str) -> list[psutil.Process]:
        """A deployment's processes, but for those that still build their replica."""
        return [
            process
            for process in self._root.children(recursive=True)
            if (found := _DEPLOYMENT.match(title(process)))
            and found[1] == deployment
            and "initialize" not in found[2]
        ]

    def usage(self) -> dict[str, Usage]:
        """Of each role: a deployment, a program, `ray::` and the class for other actors."""
        total: dict[str, Usage] = {}
        sockets = Counter(each.pid for each in psutil.net_connections("tcp"))
        for process in self._root.children(recursive=True):
            if used := _usage(process, sockets[process.pid]):
                role = role_of(title(process))
                total[role] = total.get(role, Usage()) + used
        return total

    def _instance(self, process: psutil.Process) -> str:
        """Its replica id, as its log says; empty before it is up."""
        return self._instances.get(process) or next(_said(process), "")


def role_of(process_title: str) -> str:
    """What a process is there for, whatever it is doing just now."""
    if found := _DEPLOYMENT.match(process_title):
        return found[1]
    return process_title.partition(".")[0] if "::" in process_title else process_title


def actors(usage: Mapping[str, Usage]) -> int:
    """How many processes are actors of Ray: all but its own programs and idle workers."""
    return sum(
        used.processes
        for role, used in usage.items()
        if role in (REPLICA, SCHEDULER, INGRESS)
        or (role.startswith("ray::") and "IDLE" not in role)
    )


def _said(process: psutil.Process) -> Iterator[str]:
    """Replica ids in the process' own log."""
    try:
        logs = {file.path for file in process.open_files() if file.path.endswith(".err")}
    except psutil.Error:
        return
    # Not those that others write, too: raylet.err is open in all of them.
    for log in (Path(path) for path in logs if f"-{process.pid}." in path):
        yield from _UP.findall(log.read_text(errors="replace"))


def _usage(process: psutil.Process, sockets: int) -> Usage | None:
    """None where it is gone."""
    try:
        with process.oneshot():
            return Usage(
                1,
                process.memory_info().rss / (1 << 20),
                process.num_fds(),
                process.num_threads(),
                sockets,
            )
    except psutil.Error:
        return None
