"""The numbers of a move and of the slowdown, from plain times; no server."""

import json
from itertools import accumulate

import pytest

from app.config import load
from deployments.emulated.profile import load_profile
from load_tests import migration, migration_client
from load_tests import migration_report as report
from load_tests.migration_report import LABELS, Cell, Move, Slowdown, Window, gap, split

RECORD = {
    "from": "a",
    "to": "b",
    "outcome": "completed",
    "stages": 3,
    "blocks": 8,
    "bytes": 1_048_576,
    "downtime_ms": 12.5,
    "recomputed_tokens": 0,
}
QUIET, MOVING = Window(0.0, 10.0, 0, moving=False), Window(10.0, 20.0, 3, moving=True)


def tokens(slow=None, count=40):
    """Arrivals from 0 on, a second apart but for the intervals named in `slow`."""
    intervals = dict.fromkeys(range(count), 1.0) | (slow or {})
    return [0.0, *accumulate(intervals.values())]


def cell(way="live", context=256, downtimes=(10.0,), step=40.0, pace="a10"):
    moves = [Move(50.0 + d, step, d, 2, 17, 0) for d in downtimes]
    return Cell(pace, way, context, moves)


def slowdown():
    found = Slowdown("a10")
    found.add([tokens()], [QUIET, MOVING])
    return found


@pytest.mark.parametrize(
    ("slow", "sent", "answered", "expected"),
    [
        ({5: 4.0}, 6.0, 6.5, 4.0),  # the call is made and answered in it
        ({5: 4.0}, 2.5, 20.5, 4.0),  # it lies between the two
        ({5: 4.0}, 9.2, 9.3, 1.0),  # it was over before the call
        ({9: 4.0}, 0.2, 0.5, 4.0),  # the tenth token after the answer ends it
        ({10: 4.0}, 0.2, 0.5, 1.0),  # the eleventh does
        ({0: 4.0}, -1.0, -0.5, 4.0),  # no token before the call
    ],
)
def test_gap(slow, sent, answered, expected):
    assert gap(tokens(slow), sent, answered) == expected


def test_a_move_from_its_record_and_its_stream():
    move = Move.of(RECORD, tokens({0: 3.0, 12: 6.0}), sent=13.5, answered=14.5)
    assert move == Move(
        gap_ms=6000.0,
        step_ms=1000.0,
        downtime_ms=12.5,
        stages=3,
        blocks=8,
        recomputed_tokens=0,
    )


def test_a_cell_over_its_moves():
    assert cell(downtimes=(3.0, 1.0, 2.0)).over("downtime_ms") == (2.0, 1.0, 3.0)


def test_intervals_are_split_by_window():
    quiet, moving = split(tokens({2: 1.5, 12: 2.0}), [QUIET, MOVING])
    assert quiet == [1.0, 1.0, 1.5, *[1.0] * 6]
    # The first began in the quiet window; the last is the one that is over after the moves.
    assert moving == [1.0, 1.0, 1.0, 2.0, *[1.0] * 6]


def test_tokens_that_were_read_at_once_share_their_interval():
    quiet, moving = split([1.0, 1.0, 4.0, 4.0, 4.0, 6.0, 12.0, 12.0], [QUIET, MOVING])
    assert quiet == [1.0, 1.0, 1.0, 2.0]
    assert moving == [3.0, 3.0]


def test_between_windows_nothing_counts():
    apart = [Window(0.0, 2.5, 0, moving=False), Window(6.5, 8.0, 1, moving=True)]
    quiet, moving = split(tokens(), apart)
    assert (len(quiet), len(moving)) == (2, 2)


def test_slowdown_in_percent():
    found = Slowdown("a10")
    slow = dict.fromkeys(range(10, 30), 1.25)
    found.add([tokens(slow), tokens(slow)], [QUIET, MOVING])
    found.add([tokens()], [QUIET, MOVING])
    assert found.median_percent == pytest.approx([25.0, 0.0])
    assert found.mean_percent == pytest.approx([25.0, 0.0], abs=3)
    assert found.quiet_ms == [1000.0, 1000.0]
    assert found.moves == 6


def test_aims():
    cells = [cell(downtimes=(12.0, 10.0, 90.0)), cell(context=512, downtimes=(18.0,), step=36.0)]
    assert report.flatness(cells) == 1.5
    assert report.downtime_steps(cells) == 0.5


def test_rows():
    line = report.row(cell("recompute", 8192, (3.0, 1.0, 2.0)))
    assert line == "| 8192 | recompute | 52.0 [51.0 53.0] | 2.0 [1.0 3.0] | 2 | 17 | 0 | 40.0 |"
    assert line.count("|") == report.HEADING.splitlines()[0].count("|")


def test_progress():
    assert report.progress(cell()) == (
        "  a10       live   256 tokens: gap 60.0 [60.0 60.0] ms,"
        " downtime 10.0 [10.0 10.0] ms, 2 stages, step 40.0 ms"
    )


def test_a_section_orders_its_rows_by_context():
    cells = [cell(way, context) for way in LABELS for context in (256, 512)]
    lines = report.section([*cells, cell(pace="tiny")], slowdown()).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith(("| 2", "| 5"))] == (
        ["| 256"] * 3 + ["| 512"] * 3
    )
    assert lines[-3:] == [
        "- largest / smallest downtime, live: 1.00 (aim: at most 1.5)",
        "- largest downtime / step, live: 0.25 (aim: at most 1)",
        "- slowdown of the others: mean +0.00 [+0.00 +0.00] %, median +0.00 [+0.00 +0.00] %,"
        " 3 moves (step 1000.0 ms) (aim: at most 1 %)",
    ]


def test_all_files_are_written(tmp_path):
    cells = [cell(way, context) for way in LABELS for context in (256, 8192)]
    shown = report.write(cells, [slowdown()], tmp_path / "new")
    assert (tmp_path / "new/migration.md").read_text() == shown + "\n"
    assert (tmp_path / "new/migration.svg").read_text().startswith("<?xml")
    content = json.loads((tmp_path / "new/migration.json").read_text())
    assert content["cells"][0]["moves"][0]["downtime_ms"] == 10.0
    assert content["slowdowns"][0]["moves"] == 3


@pytest.mark.parametrize("way", migration.MAX_STAGES)
@pytest.mark.parametrize("pace", migration.PACES)
def test_the_fleet_of_each_pace_and_way_is_valid_and_moves_nothing_by_itself(pace, way):
    config = load(migration.fleet_args(pace, way))
    assert (config.engine.emulated is not None) == (pace == "a10")
    assert not config.migration.enabled


def test_the_emulated_memory_holds_all_that_runs_at_once():
    profile = load_profile("a10-llama-7b")
    round_s = 2 * len(migration.ORDER) * migration.WINDOW_S  # as long again to begin and to place
    grown = len(migration.BESIDE) * round_s / profile.weights_s
    most = max(migration_client.MAX_MODEL_LEN, sum(migration.BESIDE) + grown)
    assert most < profile.blocks * profile.block_size


def test_the_output_outlasts_the_longest_move_at_the_pace_of_an_a10():
    profile = load_profile("a10-llama-7b")
    context = migration_client.MAX_MODEL_LEN - migration_client.ROOM_TOKENS
    steps = profile.copy_time_s(context) / profile.step_s(1, context, 0)
    assert report.BEFORE + 2 * steps + report.AFTER < migration_client.ROOM_TOKENS
