"""Scenario files: what they mean, and what is wrong in a broken one."""

import pytest
import yaml

from app import config
from load_tests.baselines import BASELINES, merge
from load_tests.scenario import SCENARIOS, ScenarioError, load_scenario
from load_tests.traces.trace import TraceError

MINIMAL = {"trace": {"input": "S", "output": "L"}, "requests": 100, "rates": [2.0]}
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "".join(
    f"{at},GPT-4,{tokens},20,0,API log\n" for at, tokens in enumerate((10, 9000, 30, 40, 50, 60))
)


@pytest.fixture
def scenario(tmp_path):
    def scenario(**changes):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({**MINIMAL, **changes}))
        return load_scenario(str(file))

    return scenario


@pytest.fixture
def burstgpt(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(BURSTGPT)
    return {"file": str(file), "format": "burstgpt"}


def lengths(trace):
    return [(request.input_tokens, request.output_tokens) for request in trace]


def test_defaults(scenario):
    minimal = scenario()
    assert minimal.name == "mine"
    assert (minimal.instances, minimal.profile) == (16, "a10-llama-7b")
    assert minimal.policies == list(BASELINES)
    assert minimal.arrivals.process == "poisson"
    assert scenario(name="other").name == "other"


def test_merge_is_deep_and_leaves_its_arguments():
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(base, {"a": {"c": {"f": 4}}, "e": {"g": 5}}) == {
        "a": {"b": 1, "c": {"d": 2, "f": 4}},
        "e": {"g": 5},
    }
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_fleet_args(scenario):
    mine = scenario(
        instances=4,
        profile="fast",
        args={
            "migration": {"out_threshold": 10},
            "model": {"engine_kwargs": {"max_num_seqs": 8}},
        },
    )
    assert mine.fleet_args("infaas") == {
        "model": {
            "model_id": "emulated",
            "model_source": "models/tiny-llama",
            "engine_kwargs": {
                "enable_prefix_caching": False,
                "watermark": 0.01,
                "max_num_seqs": 8,
            },
        },
        "engine": {"emulated": {"profile": "fast"}},
        "priorities": {
            "high": {
                "priority": -10,
                "headroom_tokens": 1600,
                "max_queued_tokens": None,
                "max_queue_s": None,
            },
            "normal": {"max_queued_tokens": None, "max_queue_s": None},
        },
        "replicas": 4,
        "dispatch": "freeness",
        "migration": {"enabled": False, "out_threshold": 10},
    }


def test_a_fleet_that_is_scaled_has_so_many_instances_at_most(scenario):
    mine = scenario(instances=4, args={"autoscaling": {"min": 2}})
    fleet = config.load(mine.fleet_args("llumnix"))
    assert (fleet.autoscaling.min, fleet.autoscaling.max) == (2, 4)


def test_each_variant_is_a_scenario_with_further_changes(scenario):
    mine = scenario(
        args={"migration": {"in_threshold": 7}, "autoscaling": {"min": 2}},
        variants={
            "eager": {"autoscaling": {"period_s": 1}},
            "lazy": {"autoscaling": {"period_s": 60, "min": 1}},
        },
    )
    eager, lazy = mine.each()
    assert (eager.name, lazy.name) == ("mine@eager", "mine@lazy")
    assert eager.args["autoscaling"] == {"min": 2, "period_s": 1}
    assert lazy.args["autoscaling"] == {"min": 1, "period_s": 60}
    assert eager.args["migration"] == mine.args["migration"]
    assert eager.each() == [eager]


def test_nobody_is_refused_unless_the_scenario_says_so(scenario):
    bounded = scenario(args={"priorities": {"normal": {"max_queue_s": 10.0}}})
    for mine, max_queue_s in ((scenario(), None), (bounded, 10.0)):
        classes = config.load(mine.fleet_args("llumnix")).priorities
        assert [classes[name].max_queued_tokens for name in ("high", "normal")] == [None, None]
        assert classes["normal"].max_queue_s == max_queue_s


@pytest.mark.parametrize("policy", BASELINES)
def test_the_fleet_takes_the_args_of_each_policy(scenario, policy):
    fleet = config.load(scenario().fleet_args(policy))
    assert fleet.replicas == 16
    assert fleet.migration.enabled == policy.startswith("llumnix")


def test_to_llumnix_base_all_requests_are_alike_whatever_the_scenario_says(scenario):
    urgent = {"priorities": {"high": {"priority": -5, "headroom_tokens": 99}}}
    mine = scenario(args=urgent)
    high, normal = (
        config.load(mine.fleet_args("llumnix_base")).priorities[name] for name in ("high", "normal")
    )
    assert (high.priority, high.headroom_tokens) == (normal.priority, normal.headroom_tokens)
    with_them = config.load(mine.fleet_args("llumnix")).priorities["high"]
    assert (with_them.priority, with_them.headroom_tokens) == (-5, 99)


def test_trace_at_changes_arrivals_alone(scenario):
    mine = scenario(high_priority=0.5)
    slow, fast = mine.trace_at(1.0), mine.trace_at(4.0)
    assert len(slow) == 100
    assert lengths(slow) == lengths(fast)
    assert slow[-1].at == pytest.approx(4 * fast[-1].at)
    assert {request.priority for request in slow} == {"high", "normal"}


def test_gamma_arrivals_and_seed(scenario):
    plain = scenario().trace_at(1.0)
    bursty = scenario(arrivals={"process": "gamma", "cv": 4.0}).trace_at(1.0)
    assert lengths(plain) == lengths(bursty)
    assert [r.at for r in plain] != [r.at for r in bursty]
    assert lengths(scenario(seed=1).trace_at(1.0)) != lengths(plain)


def test_a_file_as_it_was_recorded(scenario, burstgpt):
    recorded = scenario(trace=burstgpt, requests=5, arrivals={"process": "recorded"})
    trace = recorded.trace_at(2.0)
    assert lengths(trace) == [(10, 20), (6000, 20), (30, 20), (40, 20), (50, 20)]
    assert [request.at for request in trace] == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_a_file_with_drawn_arrivals(scenario, burstgpt):
    mine = scenario(trace={**burstgpt, "cap": 45}, requests=6, high_priority=1.0)
    trace = mine.trace_at(1.0)
    assert sorted(lengths(trace)) == [(n, 20) for n in (10, 30, 40, 45, 45, 45)]
    assert [r.at for r in trace] == sorted(r.at for r in trace)
    assert {request.priority for request in trace} == {"high"}
    assert lengths(mine.trace_at(9.0)) == lengths(trace)


def test_a_file_that_is_too_short(scenario, burstgpt):
    with pytest.raises(TraceError, match=r"trace.csv: has 6 requests, not 100"):
        scenario(trace=burstgpt).trace_at(1.0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rate": 3}, "rate: unknown key; did you mean 'rates'?"),
        ({"arrivals": {"proces": "gamma"}}, "arrivals.proces: unknown key; did you mean 'process'"),
        ({"trace": {"input": "S", "output": "L", "x": 1}}, "trace.x: unknown key"),
        ({"trace": {"input": "S", "output": "XL"}}, "trace.output: 'XL' is not known"),
        ({"trace": {"input": "S"}}, "trace.output: missing"),
        ({"trace": {"file": "x", "format": "csv"}}, "trace.format: 'csv' is not known"),
        ({"trace": "M"}, "trace: must be a mapping of keys, not 'M'"),
        ({"rates": []}, "rates: "),
        ({"rates": [1.0, 2.0, 1.0]}, "rates: each rate once"),
        ({"policies": []}, "policies: "),
        ({"rates": [1.0, 0]}, "rates.1: must be greater than 0, not 0"),
        ({"requests": "many"}, "requests: must be a valid integer, not 'many'"),
        ({"policies": ["lumnix"]}, "policies: 'lumnix' is not known; did you mean 'llumnix'?"),
        ({"high_priority": 10}, "high_priority: must be less than or equal to 1, not 10"),
        ({"arrivals": {"cv": 2.0}}, "arrivals: cv: poisson arrivals take none"),
        ({"arrivals": {"process": "recorded"}}, "arrivals.process: recorded needs a file"),
        (
            {
                "arrivals": {"process": "recorded"},
                "trace": {"file": "x.json", "format": "sharegpt"},
            },
            "arrivals.process: recorded needs a file of burstgpt, mooncake, azure",
        ),
        ({"args": {"replicas": 2}}, "args: replicas cannot be set here, 'instances' does that"),
        ({"args": {"autoscaling": {"max": 2}}}, "args: autoscaling.max cannot be set here"),
        ({"args": {"engine": "vllm"}}, "args: engine cannot be set here, 'profile' does that"),
        ({"variants": {"x": {"replicas": 2}}}, "variants: replicas cannot be set here"),
        ({"args": {"migration": {"enabled": True}}}, "args: migration.enabled cannot be set here"),
    ],
)
def test_what_is_wrong(scenario, changes, problem):
    with pytest.raises(ScenarioError) as caught:
        scenario(**changes)
    message = str(caught.value)
    assert message.startswith(f"mine.yaml: {problem}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "problem"), [("a: [", "no YAML"), ("", "must be a mapping"), ("- 1", "must be a")]
)
def test_no_scenario_at_all(tmp_path, text, problem):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ScenarioError, match=rf"broken.yaml: {problem}[^\n]*$"):
        load_scenario(str(file))


def test_a_file_that_is_no_text(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ScenarioError, match=r"broken.yaml: no YAML"):
        load_scenario(str(file))


def test_to_scale_by_nothing_is_not_to_scale(scenario):
    assert scenario(args={"autoscaling": None}, instances=4).fleet_config("llumnix").replicas == 4


def test_no_such_scenario():
    with pytest.raises(
        ScenarioError, match=r"'x-x' is no scenario.*burstgpt, burstgpt-4, l-l, l-l-4, l-s"
    ):
        load_scenario("x-x")


@pytest.mark.parametrize(
    ("name", "rates", "cv"),
    [("autoscale", [2.0, 2.5, 3.0], 1), *((f"autoscale-cv{cv}", [2.0], cv) for cv in (2, 4, 6))],
)
def test_the_papers_scenarios_of_auto_scaling(name, rates, cv):
    paper = load_scenario(name)
    assert (paper.rates, paper.arrivals.cv) == (rates, cv)
    for variant in paper.each():
        infaas, llumnix = (config.load(variant.fleet_args(name)) for name in paper.policies)
        assert infaas.autoscaling == llumnix.autoscaling
        assert llumnix.autoscaling.max == 16


@pytest.mark.parametrize("name", ["s-s", "m-m", "l-l", "s-l", "l-s", "sharegpt", "burstgpt"])
def test_the_papers_scenarios(name):
    paper = load_scenario(name)
    assert paper.name == name
    assert (paper.requests, paper.instances) == (10_000, 16)
    assert paper.policies == [policy for policy in BASELINES if policy != "llumnix_base"]
    assert len(paper.rates) == 3
    assert paper.rates == sorted(paper.rates)
    migration = config.load(paper.fleet_args("llumnix")).migration
    assert (migration.out_threshold, migration.in_threshold) == (10, 3)
    trace = paper.trace_at(paper.rates[0])
    assert len(trace) / trace[-1].at == pytest.approx(paper.rates[0], rel=0.05)


@pytest.mark.parametrize("cv", [2, 4, 6, 8])
def test_the_papers_scenarios_with_priorities(cv):
    paper = load_scenario(f"priorities-cv{cv}")
    assert (paper.requests, paper.instances, paper.rates) == (10_000, 16, [26, 40, 64])
    assert (paper.high_priority, paper.arrivals.cv) == (0.1, cv)
    assert paper.policies == ["llumnix_base", "llumnix"]
    assert config.load(paper.fleet_args("llumnix")).priorities["high"].headroom_tokens == 12_016


def test_every_scenario_file_is_valid():
    for file in SCENARIOS.glob("*.yaml"):
        load_scenario(file.stem)
