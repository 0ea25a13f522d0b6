"""What auto-scaling saves: which runs are compared, and at what P99 TTFT."""

import pytest

from load_tests import plots, scaling_report
from load_tests.outcome import Sample
from load_tests.results import save
from load_tests.scaling_report import costs, hours_at
from tests.load_tests.runs import a_run, load, of_ttft
from tests.load_tests.test_report import rows


def scaled(ttft, instances, **about):
    """Two hours of that P99 TTFT; they begin with one instance, and have so many on average."""
    run = of_ttft(ttft, **{"backend": "simulator", "rate": 2.0} | about)
    run.duration = 7200.0
    many = tuple(load(f"x{n}") for n in range(2 * instances - 1))
    run.samples = [Sample(0.0, (load("x"),)), Sample(3600.0, many)]
    return run


def variant(name):
    return {"scenario": f"autoscale@{name}"}


@pytest.fixture
def results(tmp_path):
    """Llumnix is as fast with 4 and with 6 instances as INFaaS++ with 5 and between 6 and 8."""
    for name, ours, theirs in (("low", (8.0, 4), (8.0, 5)), ("mid", (2.0, 6), (4.0, 6))):
        save(scaled(*ours, **variant(name)), tmp_path)
        save(scaled(*theirs, policy="infaas", **variant(name)), tmp_path)
    save(scaled(1.0, 8, policy="infaas", **variant("high")), tmp_path)
    save(scaled(0.5, 9, **variant("high")), tmp_path)
    return tmp_path


def test_savings_are_those_at_equal_p99_ttft(results):
    saved = rows(scaling_report.write(results))
    assert [(row["variant"], row["hours, Llumnix"]) for row in saved] == [
        ("low", "8.00"),
        ("mid", "12.0"),
        ("high", "18.0"),
    ]
    low, mid, high = saved
    assert (low["hours, INFaaS++"], low["fewer, %"]) == ("10.0", "20.0")
    assert (mid["hours, INFaaS++"], mid["fewer, %"]) == ("14.0", "14.3")  # half of 12 to 16
    assert (high["hours, INFaaS++"], high["fewer, %"]) == ("over 16.0", "")


def test_the_report_has_all_runs_and_a_figure(results):
    scaling_report.write(results)
    shown = (results / "scaling.md").read_text()
    assert len(rows(shown, "# Auto-scaling")) == 6
    first = rows(shown, "# Auto-scaling")[0]
    assert (first["instances"], first["hours"]) == ("5.00", "10.0")
    assert "![autoscale, Simulator](simulator-autoscale-scaling.svg)" in shown
    svg = (results / "simulator-autoscale-scaling.svg").read_text()
    assert all(plots.style(policy).colour in svg for policy in ("llumnix", "infaas"))


def test_runs_of_other_places_are_not_compared(tmp_path):
    save(scaled(1.0, 4, **variant("low")), tmp_path)
    save(scaled(1.0, 5, policy="infaas", rate=3.0, **variant("low")), tmp_path)
    save(scaled(1.0, 5, policy="infaas", scenario="other@low"), tmp_path)
    save(scaled(1.0, 5, policy="infaas", backend="fleet", **variant("low")), tmp_path)
    assert scaling_report.write(tmp_path) == ""
    assert len(rows((tmp_path / "scaling.md").read_text())) == 4


def test_fleets_of_one_size_are_not_scaled(tmp_path):
    save(of_ttft(1.0), tmp_path)
    save(a_run(policy="pool"), tmp_path)
    assert scaling_report.write(tmp_path) == ""
    assert not (tmp_path / "scaling.md").exists()


@pytest.mark.parametrize(
    ("p99_s", "hours"), [(32.0, 8), (16.0, 8), (4.0, 10), (2.0, 11), (1.0, 12), (0.9, None)]
)
def test_a_run_that_is_slower_than_a_cheaper_one_is_left_out(tmp_path, p99_s, hours):
    for name, ttft, number in (("a", 16.0, 4), ("b", 20.0, 5), ("c", 1.0, 6)):
        save(scaled(ttft, number, **variant(name)), tmp_path)
    assert hours_at(list(costs(tmp_path)), p99_s) == pytest.approx(hours)
