"""The bound on what rescheduling can reach."""

import msgspec
import pytest

from deployments.emulated.profile import Profile
from load_tests.pool import Pool
from load_tests.traces.trace import TraceError, TraceRequest

PROFILE = Profile(
    weights_s=0.01,
    token_s=0.001,
    context_s=0.0,
    pair_s=0.0,
    copy_s=0.0,
    copy_token_s=0.0,
    blocks=10,
    block_size=10,
)


def play(trace: list[TraceRequest], instances: int = 1) -> Pool:
    pool = Pool(PROFILE, instances)
    pool.play(trace, lambda: None)
    return pool


def ttfts(pool: Pool) -> list[float]:
    return [one.tokens[0] - one.arrival for one in pool.served]


def test_a_request_alone_waits_for_its_prefill_and_decodes_at_full_speed():
    (served,) = play([TraceRequest(1.0, 50, 5)]).served
    assert list(served.tokens) == pytest.approx([1.05, 1.06, 1.07, 1.08, 1.09])
    assert served.queue_s == 0


def test_what_does_not_fit_into_one_instance_fits_into_the_pool_of_two():
    trace = [TraceRequest(0.0, 60, 20), TraceRequest(0.0, 60, 20)]
    assert [one.queue_s for one in play(trace).served] == [0, pytest.approx(0.25)]
    assert [one.queue_s for one in play(trace, instances=2).served] == [0, 0]


def test_a_prompt_is_computed_by_one_instance_however_many_there_are():
    assert ttfts(play([TraceRequest(0.0, 80, 1)], instances=8)) == pytest.approx([0.08])


def test_the_queue_is_served_in_order_even_where_a_later_request_would_fit():
    trace = [TraceRequest(0.0, 60, 20), TraceRequest(0.01, 60, 1), TraceRequest(0.02, 5, 1)]
    _, second, third = play(trace).served
    assert second.tokens[0] <= third.tokens[0]
    assert third.queue_s > 0.1


def test_a_burst_of_prompts_is_computed_in_as_many_steps_as_an_instance_s_budget_asks_for():
    pool = Pool(msgspec.structs.replace(PROFILE, max_step_tokens=20, max_batch=20), 2)
    pool.play([TraceRequest(0.0, 20, 1)] * 6, lambda: None)
    assert ttfts(pool) == pytest.approx([0.02, 0.02, 0.04, 0.04, 0.06, 0.06])


def test_a_request_that_never_fits_is_told_so():
    with pytest.raises(TraceError, match="111 tokens"):
        play([TraceRequest(0.0, 101, 10)])


def test_requests_that_outgrow_the_memory_are_preempted_and_still_get_all_tokens():
    trace = [TraceRequest(0.0, 40, 40), TraceRequest(0.0, 40, 40)]
    first, second = play(trace).served
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert second.preempted_s > 0
    assert [len(one.tokens) for one in (first, second)] == [40, 40]
    assert list(second.tokens) == sorted(second.tokens)
