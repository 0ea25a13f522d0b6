"""CPU time of each process of a server."""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Share:
    """A process, and how much of one core it used."""

    pid: int
    name: str
    percent: float


class CpuMeter:
    """Counts from when it was made. Processes that come later count from their start.

    `alone`: the process itself, not what it started.
    """

    def __init__(self, pid: int, alone: bool = False) -> None:
        self._pid = pid
        self._alone = alone
        self._before = {process.pid: _used(process) for process in self._family()}
        self._at = time.perf_counter()

    def shares(self) -> list[Share]:
        """The processes so far, the busiest first."""
        seconds = time.perf_counter() - self._at
        shares = [
            Share(
                process.pid,
                title(process),
                100 * (_used(process) - self._before.get(process.pid, 0.0)) / seconds,
            )
            for process in self._family()
        ]
        return sorted(shares, key=lambda share: -share.percent)

    def _family(self) -> list[psutil.Process]:
        root = psutil.Process(self._pid)
        return [root] if self._alone else [root, *root.children(recursive=True)]


def title(process: psutil.Process) -> str:
    """A short name: what the process calls itself, the module or script, or the program."""
    try:
        words = process.cmdline() or [process.name()]
    except psutil.Error:
        return "?"
    if "::" in words[0]:
        return words[0].strip()
    program = Path(words[0].split(" ")[0]).name
    if not program.startswith("python"):
        return program
    for word, following in pairwise([*words[1:], ""]):
        if word == "-m":
            return following
        if word == "-c":
            break
        if not word.startswith("-"):
            return Path(word).name
    return program


def _used(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
