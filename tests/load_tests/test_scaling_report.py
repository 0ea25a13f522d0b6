"""What auto-scaling saves: which runs are compared, and at what P99 TTFT."""

import pytest

from load_tests import plots, scaling_report
from load_tests.outcome import Sample
from load_tests.results import save
from load_tests.scaling_report import costs, instances_at
from tests.load_tests.runs import a_run, load, of_ttft
from tests.load_tests.test_report import rows


def scaled(ttft, instances, **about):
    """A run of that P99 TTFT; it begins with one instance, and has so many on average."""
    run = of_ttft(ttft, **{"backend": "simulator", "rate": 2.0} | about)
    many = int(2 * instances - 1)
    run.samples = [
        Sample(0.0, (load("x"),)),
        Sample(5.0, tuple(load(f"x{n}") for n in range(many))),
    ]
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
    assert [(row["variant"], row["instances, Llumnix"]) for row in saved] == [
        ("low", "4.00"),
        ("mid", "6.00"),
        ("high", "9.00"),
    ]
    low, mid, high = saved
    assert (low["instances, INFaaS++"], low["fewer, %"]) == ("5.00", "20.0")
    assert (mid["instances, INFaaS++"], mid["fewer, %"]) == ("7.00", "14.3")  # half of 6 to 8
    assert (high["instances, INFaaS++"], high["fewer, %"]) == ("over 8.00", "")


def test_the_report_has_all_runs_and_a_figure(results):
    scaling_report.write(results)
    shown = (results / "scaling.md").read_text()
    assert len(rows(shown, "# Auto-scaling")) == 6
    assert rows(shown, "# Auto-scaling")[0]["hours"] == "0.0139"  # 5 instances, 10 seconds
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
    ("p99_s", "instances"), [(32.0, 4), (16.0, 4), (4.0, 5), (2.0, 5.5), (1.0, 6), (0.9, None)]
)
def test_a_run_that_is_slower_with_more_instances_is_left_out(tmp_path, p99_s, instances):
    for name, ttft, number in (("a", 16.0, 4), ("b", 20.0, 5), ("c", 1.0, 6)):
        save(scaled(ttft, number, **variant(name)), tmp_path)
    assert instances_at(list(costs(tmp_path)), p99_s) == pytest.approx(instances)
