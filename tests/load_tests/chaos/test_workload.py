"""The pool of requests."""

from load_tests.chaos import workload


def test_a_seed_makes_the_same_pool_every_time_and_another_one_another():
    assert workload.pool("vllm", 1) == workload.pool("vllm", 1) != workload.pool("vllm", 2)


def test_requests_are_as_long_as_they_should_be_and_within_what_is_probed():
    for request in workload.pool("emulated", 0):
        shortest, longest = workload.PROMPT_TOKENS
        assert shortest <= workload.length(request) <= longest
        assert request.body()["return_token_ids"] is True
    assert sum((longest, workload.OUTPUT_TOKENS[1])) <= max(workload.PROBED)


def test_real_engines_are_asked_for_all_kinds_of_sampling():
    bodies = [request.body() for request in workload.pool("vllm", 0)]
    assert any(body["temperature"] == 0 for body in bodies)
    assert any(body.get("frequency_penalty") for body in bodies)
    formats = {kind for body in bodies for kind in body.get("structured_outputs", {})}
    assert formats == {"json", "regex"}
    # What is not greedy has a seed, or there would be nothing to compare with.
    assert all(body["temperature"] == 0 or body["seed"] for body in bodies)


def test_a_copy_differs_in_its_name_alone():
    request = workload.pool("vllm", 0)[3]
    copy = workload.copy_of(request, "chaos-1")
    assert copy.headers == {"X-Request-Id": "chaos-1"}
    assert copy.body() == request.body()


def test_a_probe_is_one_prefill():
    probe = workload.probe(128, 0)
    assert workload.length(probe) == 128
    assert probe.body()["max_tokens"] == 1
    assert probe != workload.probe(128, 1)  # or a prefix cache would know it
