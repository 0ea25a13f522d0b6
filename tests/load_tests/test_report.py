"""The numbers in a report's tables, and what its figures show."""

import re

import pytest

from load_tests import memory_plot, plots, report
from load_tests.outcome import Sample
from load_tests.results import load_all, save, to_json
from tests.load_tests.runs import a_run, load, move, of_ttft, request


def cells_of(*runs):
    return {(run.policy, run.rate): to_json(run) for run in runs}


def rows(markdown, heading=""):
    """The rows, as dicts, of the first table after `heading`."""
    lines = markdown[markdown.index(heading) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    end = next((index for index, row in enumerate(cells) if len(row) < 2), len(cells))
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:end]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A scenario's folder: three policies at two rates on both backends.

    Llumnix is 2 and 5 times as fast as INFaaS++; the simulator's steps take a tenth longer than
    the fleet's.
    """
    folder = tmp_path_factory.mktemp("results")
    for backend, step in (("fleet", 0.1), ("simulator", 0.11)):
        for policy, ttfts in {"llumnix": (1, 2), "infaas": (2, 10), "queue": (1, 3)}.items():
            for rate, ttft in zip((7.25, 10.0), ttfts, strict=True):
                about = {"policy": policy, "rate": rate, "backend": backend}
                run = of_ttft(float(ttft), step, **about)
                if policy == "llumnix":
                    run.moves = [move(3.0), move(4.0, "y", "x"), move(5.0, outcome="refused")]
                save(run, folder)
    (folder / "summary.md").write_text(report.write(folder))
    return folder / "m-m"


def test_summary_is_of_the_knee(results):
    summary = rows((results.parent / "summary.md").read_text())
    assert [(row["backend"], row["req/s"], row["baseline"]) for row in summary] == [
        ("fleet", "10", "INFaaS++"),
        ("fleet", "10", "shortest queue"),
        ("simulator", "10", "INFaaS++"),
        ("simulator", "10", "shortest queue"),
    ]
    infaas, queue, *_ = summary
    assert (infaas["P99 TTFT"], infaas["mean TPOT"]) == ("5.00", "1.00")
    assert (queue["mean TTFT"], queue["P99 e2e"]) == ("1.50", "1.45")  # 3.2 s over 2.2 s
    assert infaas["preemption loss"] == "-"  # neither lost anything


def test_tables_of_a_scenario(results):
    shown = (results / "report.md").read_text()
    assert shown.startswith("# m-m\n\n## Fleet\n\n2 instances of emulated, 4 requests")
    latencies = rows(shown, "## Fleet")
    assert [row["policy"] for row in latencies[:3]] == ["**Llumnix**", "INFaaS++", "shortest queue"]
    assert [row["req/s"] for row in latencies] == ["7.25"] * 3 + ["10"] * 3
    assert latencies[4]["TTFT P99, s"] == "10.0"
    assert latencies[4]["TPOT mean, ms"] == "100"
    assert latencies[4]["e2e P99, s"] == "10.2"
    moves = rows(shown, "### Moves")
    assert [(row["policy"], row["moves"], row["refused"]) for row in moves] == [
        ("**Llumnix**", "2", "1")
    ] * 2
    assert moves[0]["downtime mean, ms"] == "20.0"
    assert "### Priority classes" not in shown
    assert "### Further facts" not in shown


def test_refused_requests_are_shown_apart_of_those_that_failed(tmp_path):
    served = [request("a", 1.0), request("b", error="HTTP 429: full"), request("c", error="lost")]
    save(a_run(served), tmp_path)
    report.write(tmp_path)
    (row,) = rows((tmp_path / "m-m" / "report.md").read_text(), "## Fleet")
    assert (row["failed"], row["refused"]) == ("2", "1")


def test_simulator_beside_fleet(results):
    compared = rows((results / "report.md").read_text(), "## Simulator beside fleet")
    assert len(compared) == 6
    assert compared[1]["TTFT P99, ms"] == "2,000 / 2,000 (+0.0 %)"
    assert compared[1]["TPOT P50, ms"] == "110 / 100 (+10.0 %)"


def test_only_what_both_have_is_compared():
    simulated = cells_of(of_ttft(0.9), of_ttft(1.0, rate=8.0))
    real = cells_of(of_ttft(1.0), of_ttft(1.0, policy="infaas"))
    (row,) = rows(report.compare(simulated, real))
    assert (row["req/s"], row["TTFT P50, ms"]) == ("7.5", "900 / 1,000 (-10.0 %)")
    assert report.compare({}, real) == ""


def test_figures_are_linked_and_colour_the_policies(results):
    shown = (results / "report.md").read_text()
    figures = re.findall(r"!\[.*?\]\((.*?)\)", shown)
    kinds = ("latency", "preemptions", "fragmentation", "memory")
    assert figures == [f"{backend}-{kind}.svg" for backend in report.BACKENDS for kind in kinds]
    colours = {policy: plots.style(policy).colour for policy in ("llumnix", "infaas", "queue")}
    for figure in figures:
        svg = (results / figure).read_text()
        drawn = {policy for policy, colour in colours.items() if colour in svg}
        if "memory" in figure:
            assert memory_plot.MOVE in svg
        else:
            at_knee = {"llumnix", "infaas"}
            assert drawn == (at_knee if "fragmentation" in figure else set(colours))


def test_a_figure_for_each_backend_has_the_scenarios_that_ran_at_several_rates(results):
    for backend in report.BACKENDS:
        svg = (results.parent / f"{backend}-rates.svg").read_text()
        assert "<!-- m-m -->" in svg
        assert all(plots.style(policy).colour in svg for policy in ("llumnix", "infaas", "queue"))


def test_what_ran_at_one_rate_is_not_drawn_against_it(tmp_path):
    save(of_ttft(1.0, policy="llumnix"), tmp_path)
    save(of_ttft(1.0, policy="infaas", rate=9.0), tmp_path)
    report.write(tmp_path)
    assert not list(tmp_path.glob("*.svg"))


def test_without_a_rival_there_is_no_knee(tmp_path):
    save(of_ttft(1.0), tmp_path)
    save(of_ttft(2.0, policy="queue"), tmp_path)
    save(of_ttft(2.0, policy="infaas", rate=9.0), tmp_path)
    assert report.knee(load_all(tmp_path / "m-m", "fleet")) is None
    assert report.write(tmp_path) == ""
    shown = (tmp_path / "m-m" / "report.md").read_text()
    assert [row["P99 TTFT"] for row in rows(shown, "### Baselines over")] == ["2.00"]
    assert "memory.svg" not in shown


def test_a_run_in_which_nothing_completed_is_no_gain():
    failed = a_run([request("a", error="HTTP 400")], rate=12.0)
    cells = cells_of(
        of_ttft(1.0, rate=6.0), of_ttft(2.0, policy="infaas", rate=6.0),
        failed, of_ttft(9.0, policy="infaas", rate=12.0),
    )  # fmt: skip
    assert report.knee(cells) == 6.0
    assert [row["req/s"] for row in rows(report.ratio_table(cells))] == ["6"]


def test_runs_of_other_sizes_are_named(tmp_path):
    save(of_ttft(1.0, rate=6.0), tmp_path)
    save(of_ttft(1.0, rate=96.0, instances=1024), tmp_path)
    report.write(tmp_path)
    sizes = "2 instances of emulated, 4 requests; 1,024 instances of emulated, 4 requests"
    assert f"\n{sizes} in each run.\n" in (tmp_path / "m-m/report.md").read_text()


def test_folders_of_other_results_are_left_alone(tmp_path):
    (tmp_path / "migration").mkdir()
    (tmp_path / "migration" / "migration.json").write_text("{}")
    assert report.write(tmp_path) == ""
    assert not (tmp_path / "migration" / "report.md").exists()


def test_memory_table():
    served = [
        request("a", 0.1, queue_s=2.0),
        request("b", 0.1, preemptions=1, preempted_s=6.0),
        request("c", 0.1),
        request("d", error="gone"),
    ]
    apart = Sample(0.0, (load(used=90, demand=30), load(used=70)))
    (row,) = rows(report.run_table(cells_of(a_run(served, [apart])), report.MEMORY))
    assert row["fragmented, %"] == "15.0"
    assert row["preempted, %"] == "25.0"
    assert row["queue mean, s"] == "0.667"
    assert row["loss mean, s"] == "2.00"
    assert row["loss of the preempted, s"] == "6.00"


def test_classes_and_facts():
    served = [request("a", 0.5, priority="high"), request("b", 1.5), request("c", 2.5)]
    cells = cells_of(a_run(served, facts={"drift_ms": 1.25}), a_run(served, rate=8.0))
    classes = rows(report.priority_table(cells))
    assert [(row["class"], row["completed"]) for row in classes[:2]] == [
        ("high", "1"),
        ("normal", "2"),
    ]
    assert [row["TTFT mean, s"] for row in classes[:2]] == ["0.500", "2.00"]
    assert [row["drift_ms"] for row in rows(report.fact_table(cells))] == ["1.25", ""]


@pytest.mark.parametrize(
    ("ours", "theirs", "shown"), [(0.0, 3.0, "∞"), (0.0, 0.0, "-"), (2.0, 3.0, "1.50")]
)
def test_ratio_of_preemption_losses(ours, theirs, shown):
    def losing(seconds, policy):
        return a_run([request("a", 0.1, preempted_s=seconds)], policy=policy)

    (row,) = rows(report.ratio_table(cells_of(losing(ours, "llumnix"), losing(theirs, "infaas"))))
    assert row["preemption loss"] == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (12.34, "12.3"),
        (99.96, "100"),
        (12345.6, "12,346"),
        (-0.5, "-0.500"),
    ],
)
def test_three_digits(value, shown):
    assert report.number(value) == shown


def test_a_policy_that_is_not_known_is_called_by_its_name_and_comes_last():
    assert plots.policies([("zigzag", 1.0), ("infaas", 1.0), ("llumnix", 2.0)]) == [
        "llumnix",
        "infaas",
        "zigzag",
    ]
    assert plots.style("zigzag").label == "zigzag"


def test_an_instance_that_left_makes_room_in_the_figure_for_one_that_comes():
    x, y, z = (load(name) for name in "xyz")
    samples = [Sample(float(n), there) for n, there in enumerate([(x,), (x, y), (y, x), (y, z)])]
    timeline = to_json(a_run(samples=samples))["timeline"]
    assert memory_plot.lanes(timeline) == {"x": 0, "y": 1, "z": 0}


@pytest.mark.parametrize("moves", [3, 10 * memory_plot.MOVES_SHOWN])
def test_memory_shows_no_more_moves_than_can_be_told_apart(tmp_path, moves):
    run = of_ttft(1.0)
    run.moves = [move(9 * n / moves) for n in range(moves)]
    file = tmp_path / "memory.svg"
    memory_plot.draw([to_json(of_ttft(2.0, policy="infaas")), to_json(run)], file)
    lines = file.read_text().count(f"stroke: {memory_plot.MOVE}; stroke-width: 0.8")
    assert lines == min(moves, memory_plot.MOVES_SHOWN)
