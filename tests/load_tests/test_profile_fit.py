"""The fit of a profile, and the profile of the paper's A10 that it gave."""

import random

import msgspec
import pytest

from deployments.emulated.profile import Profile, load_profile
from load_tests.profile_fit import A10, COPIES, STEPS, Copy, Step, error, fit, save, table

CAPACITY = {"blocks": 1000, "block_size": 16}
GPU = Profile(
    weights_s=8e-3,
    token_s=60e-6,
    context_s=150e-9,
    pair_s=2e-9,
    copy_s=3e-3,
    copy_token_s=100e-6,
    **CAPACITY,
)
TIMES = [name for name in Profile.__struct_fields__ if name.endswith("_s")]


def changed(**times):
    return msgspec.structs.replace(GPU, **times)


def measured(profile, noise=0.0):
    """What load_tests.profile_record would see, with errors of up to `noise`."""
    rng = random.Random(1)
    shapes = [(b, b * c, 0) for b in (1, 4, 16, 64, 256) for c in (128, 1024)]
    shapes += [(n, 0, n**2 / 2) for n in (32, 64, 128, 256, 512, 1024, 2048)]
    shapes += [(256, 0, 256 * start + 256**2 / 2) for start in range(0, 8192, 1024)]
    steps = [
        Step(*shape, profile.step_s(*shape) * rng.uniform(1 - noise, 1 + noise)) for shape in shapes
    ]
    copies = [
        Copy(n, profile.copy_time_s(n) * rng.uniform(1 - noise, 1 + noise))
        for n in (16, 64, 256, 1024, 4096)
    ]
    return steps, copies


def test_the_a10_profile_is_what_the_fit_gives():
    committed = msgspec.structs.asdict(load_profile("a10-llama-7b"))
    fitted = msgspec.structs.asdict(fit(STEPS, COPIES, **A10))
    assert committed.pop("source") == fitted.pop("source")
    assert committed == pytest.approx(fitted, rel=1e-3)


@pytest.mark.parametrize("point", [*STEPS, *COPIES], ids=str)
def test_the_a10_profile_is_close_to_what_was_published(point):
    assert abs(error(load_profile("a10-llama-7b"), point)) < 0.1


@pytest.mark.parametrize(
    ("profile", "noise"),
    [
        (GPU, 0.02),
        (changed(weights_s=1e-3), 0.02),  # computes longer than that from 17 tokens on
        (changed(pair_s=0.0), 0.0),
        (changed(copy_s=0.0), 0.0),
    ],
)
def test_the_fit_finds_the_profile_behind_the_times(profile, noise):
    found = fit(*measured(profile, noise), **CAPACITY)
    near = {name: pytest.approx(getattr(profile, name), rel=0.05, abs=1e-12) for name in TIMES}
    assert {name: getattr(found, name) for name in TIMES} == near


def test_times_that_shrink_give_no_negative_number():
    copies = [Copy(100, 3.0), Copy(200, 2.0), Copy(300, 1.5)]
    found = fit(measured(GPU)[0], copies, **CAPACITY)
    assert found.copy_token_s == 0
    assert 1.5 < found.copy_s < 3


def test_the_table_has_a_row_for_each_point_and_the_numbers():
    steps, copies = measured(GPU)
    rows = table(GPU, [*steps, *copies]).splitlines()
    assert len(rows) == 1 + len(steps) + len(copies) + 1
    assert all(row.endswith("+0.0 %") for row in rows[1:-1])
    assert rows[-1].startswith("weights_s 0.008, ")


def test_a_saved_profile_can_be_loaded(tmp_path):
    save(GPU, tmp_path / "gpu.json")
    assert load_profile(str(tmp_path / "gpu.json")) == GPU
