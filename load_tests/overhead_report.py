"""The results of load_tests.overhead as JSON, as a Markdown table and as a plot."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

if TYPE_CHECKING:
    from load_tests.overhead import Cell

COLOURS = {"vllm": "#8c8c8c", "fleet": "#2a6fdb"}
LABELS = {"vllm": "plain vLLM", "fleet": "one replica of the fleet"}

HEADING = (
    "| streams | plain vLLM, tokens/s | fleet, tokens/s | ratio "
    "| TTFT p50, plain → fleet | added | TTFT p95, plain → fleet | TPOT p50, plain → fleet |\n"
    "| --: | --: | --: | --: | --: | --: | --: | --: |"
)


def write(cells: Sequence["Cell"], options: Mapping[str, Any], folder: Path) -> str:
    """Writes overhead.json, .md and .svg. Returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in options.items() if k not in ("config", "results")}
    content = {"settings": settings, "cells": [_json(cell) for cell in cells]}
    (folder / "overhead.json").write_text(json.dumps(content, indent=1) + "\n")
    shown = table(cells) + "\n\n" + cpu_table(cells)
    (folder / "overhead.md").write_text(shown + "\n")
    _plot(cells, folder / "overhead.svg")
    return shown


def table(cells: Sequence["Cell"]) -> str:
    """One row for each concurrency."""
    rows = [HEADING]
    for concurrency, (vllm, fleet) in _pairs(cells).items():
        a, b = vllm.median(), fleet.median()
        rows.append(
            f"| {concurrency} | {a['output_throughput']:,.0f} | {b['output_throughput']:,.0f} "
            f"| {b['output_throughput'] / a['output_throughput']:.2f} "
            f"| {_from_to(a, b, 'median_ttft_ms')} "
            f"| {b['median_ttft_ms'] - a['median_ttft_ms']:+.1f} ms "
            f"| {_from_to(a, b, 'p95_ttft_ms')} | {_from_to(a, b, 'median_tpot_ms')} |"
        )
    return "\n".join(rows)


def cpu_table(cells: Sequence["Cell"]) -> str:
    """Where the CPU time went: percent of one core for each process, at each concurrency."""
    rows = ["| server | streams | CPU, % of one core |", "| :-- | --: | :-- |"]
    for cell in cells:
        shares = sorted(_cpu(cell).items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {percent:.0f}" for name, percent in shares if percent >= 1)
        rows.append(f"| {LABELS[cell.server]} | {cell.concurrency} | {listed} |")
    return "\n".join(rows)


def _from_to(ours: Mapping[str, float], theirs: Mapping[str, float], key: str) -> str:
    return f"{ours[key]:.1f} → {theirs[key]:.1f} ms"


def _pairs(cells: Sequence["Cell"]) -> dict[int, tuple["Cell", "Cell"]]:
    found = {(cell.server, cell.concurrency): cell for cell in cells}
    return {c: (found["vllm", c], found["fleet", c]) for _, c in found if ("fleet", c) in found}


def _json(cell: "Cell") -> dict[str, Any]:
    return {
        "server": cell.server,
        "max_concurrency": cell.concurrency,
        **cell.median(),
        "cpu_percent": _cpu(cell),
        "rounds": cell.rounds,
    }


def _cpu(cell: "Cell") -> dict[str, float]:
    names = {name for shares in cell.cpu for name in shares}
    return {name: statistics.median(shares.get(name, 0.0) for shares in cell.cpu) for name in names}


def _plot(cells: Sequence["Cell"], file: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    pairs = _pairs(cells)
    for axes, key, title in (
        (left, "output_throughput", "output tokens/s"),
        (right, "median_ttft_ms", "TTFT, median, ms"),
    ):
        for side, name in enumerate(("vllm", "fleet")):
            places = [index + 0.38 * (side - 0.5) for index in range(len(pairs))]
            medians = [pair[side].median()[key] for pair in pairs.values()]
            bars = axes.bar(places, medians, 0.36, color=COLOURS[name], label=LABELS[name])
            axes.bar_label(bars, fmt="{:,.0f}" if axes is left else "{:.1f}", fontsize=8)
            for place, pair in zip(places, pairs.values(), strict=True):
                rounds = [numbers[key] for numbers in pair[side].rounds]
                axes.plot([place] * len(rounds), rounds, ".", color="black", alpha=0.35, ms=3)
        axes.set_xticks(range(len(pairs)), [str(concurrency) for concurrency in pairs])
        axes.set_xlabel("concurrent streams")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(file)
    pyplot.close(figure)
