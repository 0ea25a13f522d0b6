"""What priorities are worth: which runs are compared, and their numbers."""

import pytest

from load_tests import priority_report
from load_tests.results import save
from tests.load_tests.runs import a_run, request
from tests.load_tests.test_report import rows


def of(high, normal, **about):
    """A run in which requests of each class wait so long for the first of their three tokens."""
    served = [
        request(f"{name}{n}", ttft, ttft + 0.1, ttft + 0.2, priority=name)
        for name, ttft in (("high", high), ("normal", normal))
        for n in range(2)
    ]
    return a_run(served, **{"backend": "simulator", "rate": 26.0} | about)


@pytest.fixture
def results(tmp_path):
    save(of(0.5, 1.1, scenario="cv8"), tmp_path)
    save(of(2.0, 1.0, scenario="cv8", policy="llumnix_base"), tmp_path)
    return tmp_path


def test_each_class_is_compared_with_itself(results):
    high, normal = rows(priority_report.write(results))
    assert (high["scenario"], high["req/s"], high["class"]) == ("cv8", "26", "high")
    assert high["P99 TTFT, s"] == "2.00 / 0.500 (4.00)"
    assert high["mean e2e, s"] == "2.20 / 0.700 (3.14)"
    assert high["mean TPOT, ms"] == "100 / 100 (1.00)"
    assert normal["class"] == "normal"
    assert normal["mean TTFT, s"] == "1.00 / 1.10 (0.909)"


def test_the_report_has_the_table_and_a_figure_for_each_backend(results):
    save(of(0.4, 1.0, scenario="cv8", backend="fleet"), results)
    save(of(0.8, 1.0, scenario="cv8", backend="fleet", policy="llumnix_base"), results)
    table = priority_report.write(results)
    shown = (results / "priorities.md").read_text()
    assert table in shown
    assert [row["backend"] for row in rows(shown)] == ["fleet"] * 2 + ["simulator"] * 2
    for backend in ("fleet", "simulator"):
        assert f"({backend}-priorities.svg)" in shown
        figure = (results / f"{backend}-priorities.svg").read_text()
        assert all(colour in figure for of in priority_report.COLOURS.values() for colour in of)


@pytest.mark.parametrize(
    "alone",
    [
        of(1.0, 1.0, scenario="cv2"),
        of(1.0, 1.0, scenario="cv2", policy="llumnix_base"),
        of(1.0, 1.0, scenario="cv2", backend="fleet", policy="llumnix_base"),
    ],
)
def test_only_what_ran_with_priorities_and_without_is_compared(results, alone):
    save(alone, results)
    assert {row["scenario"] for row in rows(priority_report.write(results))} == {"cv8"}


def test_without_classes_nothing_is_compared(tmp_path):
    for policy in ("llumnix", "llumnix_base"):
        save(a_run([request("a", 0.1)], policy=policy), tmp_path)
    assert priority_report.write(tmp_path) == ""
    assert list(tmp_path.glob("*.md")) == []
