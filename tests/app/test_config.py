from pathlib import Path

import pytest
from pydantic import ValidationError
from ray.serve._private.config import ReplicaConfig

from app import config as app_config
from app import engine_args
from app import resources as app_resources
from app.config import load
from app.resources import executor, resources
from app.validation import ConfigError


def args(**changes):
    return {"model": {"model_id": "tiny", "model_source": "org/tiny"}} | changes


def model(**changes):
    return args(model=args()["model"] | changes)


def engine(**kwargs):
    return model(engine_kwargs=kwargs)


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.setattr(app_resources, "cpu_build", lambda: False)


def test_only_the_model_must_be_named():
    config = load(args())
    assert (config.replicas, config.dispatch) == (2, "freeness")
    assert config.engine.emulated is None
    assert config.migration.enabled
    assert config.migration.backend == "auto"
    assert config.priorities["high"].priority < config.priorities["normal"].priority
    assert config.priorities["high"].headroom_tokens == 1600
    assert config.recovery.max_recoveries == 3
    assert config.admin.api_key is None


def test_every_key_can_be_set():
    config = load(
        model(engine_kwargs={"dtype": "float32"})
        | {
            "engine": {"emulated": {"profile": "a10-llama-7b"}},
            "replicas": 3,
            "dispatch": "queue",
            "migration": {
                "enabled": False,
                "backend": "gloo",
                "out_threshold": 2,
                "in_threshold": 4.5,
                "min_gain": 0,
                "max_concurrent": 1,
                "max_stages": 3,
                "timeout_s": 2,
            },
            "priorities": {
                "normal": {"priority": 1, "headroom_tokens": 2},
                "high": {"api_keys": ["sk-1"], "max_queued_tokens": 100, "max_queue_s": 2},
            },
            "recovery": {
                "max_recoveries": 0,
                "hang_s": 2.5,
                "wait_s": 10,
                "max_journal_tokens": 0,
            },
            "admin": {"enabled": False, "api_key": "secret"},
        }
    )
    assert config.model.engine_kwargs == {"dtype": "float32"}
    assert config.engine.emulated.profile == "a10-llama-7b"
    assert config.migration.in_threshold == 4.5
    assert config.priorities["normal"].headroom_tokens == 2
    assert config.priorities["high"].api_keys == ["sk-1"]
    assert config.priorities["high"].max_queued_tokens == 100
    assert config.priorities["high"].max_queue_s == 2.0
    assert (config.recovery.max_recoveries, config.recovery.max_journal_tokens) == (0, 0)
    assert (config.recovery.hang_s, config.recovery.wait_s) == (2.5, 10)
    assert config.admin.api_key == "secret"


def test_instances_are_scaled_where_the_user_says_so():
    assert load(args()).autoscaling is None
    scaled = load(args(autoscaling={"max": 8})).autoscaling
    assert (scaled.min, scaled.max, scaled.initial) == (1, 8, None)
    assert (scaled.freeness_low, scaled.freeness_high, scaled.period_s) == (10, 60, 10)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, 2),
        ({"replicas": 3}, 3),
        ({"autoscaling": {"min": 2, "max": 8}}, 2),
        ({"autoscaling": {"min": 2, "max": 8, "initial": 5}}, 5),
    ],
)
def test_instances_to_begin_with(changes, first):
    assert load(args(**changes)).first_replicas == first


def test_queues_are_bounded_unless_the_user_says_otherwise():
    assert load(args()).priorities["high"].max_queued_tokens == 2_000_000
    assert load(args()).priorities["normal"].max_queue_s == 60
    unbounded = {"normal": {"max_queued_tokens": None, "max_queue_s": None}}
    normal = load(args(priorities=unbounded)).priorities["normal"]
    assert (normal.max_queued_tokens, normal.max_queue_s) == (None, None)


def test_a_profile_file_is_found_from_any_folder(tmp_path, monkeypatch):
    a10 = (app_config.PROJECT / "load_tests/profiles/a10-llama-7b.json").read_bytes()
    (tmp_path / "mine.json").write_bytes(a10)
    monkeypatch.chdir(tmp_path)
    config = load(args(engine={"emulated": {"profile": "mine.json"}}))
    assert config.engine.emulated.profile == str(tmp_path / "mine.json")


def test_vllm_is_the_engine_without_further_keys():
    assert load(args(engine="vllm")) == load(args())


def test_every_key_is_described():
    sections = [app_config.FleetConfig, *app_config.Section.__subclasses__()]
    undescribed = [
        f"{section.__name__}.{key}"
        for section in sections
        for key, field in section.model_fields.items()
        if not field.description
    ]
    assert undescribed == []


def test_a_loaded_configuration_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        load(args()).replicas = 3


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (args(replicsa=3), "replicsa: unknown key; did you mean 'replicas'?"),
        (args(replicas="3"), "replicas: must be a valid integer, not '3'"),
        (args(replicas=True), "replicas: must be a valid integer, not True"),
        (args(replicas=0), "replicas: must be greater than or equal to 1, not 0"),
        (
            args(replicas=2, autoscaling={"max": 8}),
            "args: replicas and autoscaling are both given; keep one of them",
        ),
        (args(autoscaling={"min": 2}), "autoscaling.max: missing; it is most instances"),
        (
            args(autoscaling={"min": 0, "max": 1}),
            "autoscaling.min: must be greater than or equal to 1, not 0",
        ),
        (
            args(autoscaling={"min": 3, "max": 2}),
            "autoscaling: max is 2, fewer than min, which is 3",
        ),
        (
            args(autoscaling={"max": 2, "initial": 3}),
            "autoscaling: initial is 3, not from 1 to 2",
        ),
        (
            args(autoscaling={"max": 2, "freeness_low": 60}),
            "autoscaling: freeness_high must be more than freeness_low",
        ),
        (
            args(autoscaling={"max": 2, "period": 3}),
            "autoscaling.period: unknown key; did you mean 'period_s'?",
        ),
        (args(dispatch="freness"), "dispatch: 'freness' is not known; did you mean 'freeness'?"),
        (
            args(engine="sglang"),
            "engine: 'sglang' is not known; it is vllm, or {emulated: ...}",
        ),
        (
            args(engine={"emulatd": {}}),
            "engine.emulatd: unknown key; did you mean 'emulated'?",
        ),
        (
            args(engine={"emulated": "a10-llama-7b"}),
            "engine.emulated: must be a mapping of keys, not 'a10-llama-7b'",
        ),
        (
            args(engine={"emulated": {}}),
            "engine.emulated.profile: missing; it is a profile in load_tests/profiles by name",
        ),
        (
            args(engine={"emulated": {"profil": "a10-llama-7b", "profile": "a10-llama-7b"}}),
            "engine.emulated.profil: unknown key; did you mean 'profile'?",
        ),
        (
            args(engine={"emulated": {"profile": "a10"}}),
            "engine.emulated.profile: 'a10' is no profile and no file; profiles: a10-llama-7b,",
        ),
        (
            engine(tensor_parallel_size=2) | {"engine": {"emulated": {"profile": "a10-llama-7b"}}},
            "model.engine_kwargs.tensor_parallel_size: 2 asked for, but an emulated engine has one",
        ),
        (
            model(accelerator_type="H100") | {"engine": {"emulated": {"profile": "a10-llama-7b"}}},
            "model.accelerator_type: an emulated engine needs no accelerator",
        ),
        (
            args(engine={"emulated": {"profile": __file__}}),
            "engine.emulated.profile: test_config.py: JSON is malformed",
        ),
        (args(migration=None), "migration: must be a mapping of keys, not None"),
        (
            args(migration={"min_gian": 1}),
            "migration.min_gian: unknown key; did you mean 'min_gain'?",
        ),
        (
            args(migration={"timeout_s": 0}),
            "migration.timeout_s: must be greater than 0, not 0",
        ),
        (
            args(migration={"in_threshold": float("nan")}),
            "migration.in_threshold: must be a finite number, not nan",
        ),
        (
            args(priorities={"normal": {}, "high": {"headroom": 1}}),
            "priorities.high.headroom: unknown key; did you mean 'headroom_tokens'?",
        ),
        (
            args(priorities={"high": {}}),
            "priorities: the class 'normal' is missing: requests that name no class get it",
        ),
        (
            args(priorities={"normal": {"api_keys": ["k"]}}),
            "priorities: the class 'normal' can have no api_keys: it is open to everybody",
        ),
        (
            args(priorities={"normal": {"max_queued_tokens": 0}}),
            "priorities.normal.max_queued_tokens: must be greater than or equal to 1, not 0",
        ),
        (
            args(priorities={"normal": {"max_queue_s": 0}}),
            "priorities.normal.max_queue_s: must be greater than 0, not 0",
        ),
        (
            args(priorities={"normal": {"max_queue_s": "10"}}),
            "priorities.normal.max_queue_s: must be a valid number, not '10'",
        ),
        (
            args(recovery={"max_recoveries": -1}),
            "recovery.max_recoveries: must be greater than or equal to 0, not -1",
        ),
        (
            args(recovery={"hang_s": 1}),
            "recovery.hang_s: must be greater than or equal to 2, not 1",
        ),
        (
            args(recovery={"max_recovery": 3}),
            "recovery.max_recovery: unknown key; did you mean 'max_recoveries'?",
        ),
        ({}, "model: missing; it is the model and its engine arguments"),
        (None, "args: must be a mapping of keys, not None"),
        (
            args(model={"model_source": "org/tiny"}),
            "model.model_id: missing; it is the name clients send as `model`",
        ),
        (
            engine(max_modl_len=1),
            "model.engine_kwargs.max_modl_len: vLLM has no such engine argument;"
            " did you mean 'max_model_len'?",
        ),
        (
            engine(max_model_len="long"),
            "model.engine_kwargs.max_model_len: must be int, not 'long'",
        ),
        (
            engine(dtype="flaot32"),
            "model.engine_kwargs.dtype: must be one of"
            " auto, bfloat16, float, float16, float32, half, not 'flaot32'",
        ),
        (
            engine(model="x"),
            "model.engine_kwargs.model: cannot be set here, model.model_source says it",
        ),
        (
            engine(mm_processor_cache_gb=4),
            "model.engine_kwargs.mm_processor_cache_gb: cannot be set here, an ingress has no",
        ),
        (
            engine(tensor_parallel_size=0),
            "model.engine_kwargs.tensor_parallel_size: must be a whole number of at least 1",
        ),
        (
            args(a=1, b=2, c=3),
            "a: unknown key; known here: admin, autoscaling, dispatch, engine, migration,",
        ),
    ],
)
def test_what_is_wrong_is_named_in_one_line(wrong, line):
    with pytest.raises(ConfigError) as error:
        load(wrong)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (args(admin={"api_key": 4711}), "admin.api_key: must be a valid string"),
        (
            args(priorities={"normal": {}, "high": {"api_keys": "4711"}}),
            "priorities.high.api_keys: must be a valid list",
        ),
        (
            args(priorities={"normal": {}, "high": {"api_keys": [4711]}}),
            "priorities.high.api_keys.0: must be a valid string",
        ),
    ],
)
def test_an_api_key_is_shown_nowhere(wrong, line):
    with pytest.raises(ConfigError) as error:
        load(wrong)
    assert str(error.value) == line
    keys = {
        "admin": {"api_key": "4711"},
        "priorities": {"normal": {}, "high": {"api_keys": ["4711"]}},
    }
    assert "4711" not in repr(load(args(**keys)))


def test_several_errors_are_counted():
    with pytest.raises(ConfigError, match=r"^a: unknown key.* \(and 1 more\)$"):
        load(args(a=1, b=2))


def test_engine_arguments_are_those_of_vllm():
    known = engine_args.annotations()
    assert {"max_model_len", "block_size", "enable_log_requests"} <= known.keys()
    assert engine_args.RESERVED.keys() <= known.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_memory_utilization", 1),
        ("max_model_len", None),
        ("quantization", "fp8"),
        ("compilation_config", {"mode": 0}),
        ("dtype", "bfloat16"),
    ],
)
def test_values_that_vllm_takes_are_accepted(name, value):
    load(engine(**{name: value}))


class TestModelSource:
    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def source(self, given):
        return load(model(model_source=given)).model.model_source

    def test_a_folder_here_becomes_absolute(self, tmp_path):
        (tmp_path / "weights" / "llama").mkdir(parents=True)
        assert self.source("weights/llama") == str(tmp_path / "weights" / "llama")

    def test_a_folder_of_the_project_is_found_from_anywhere(self):
        assert self.source("app") == str(Path(app_config.__file__).parent)

    @pytest.mark.parametrize("given", ["./llama", "../llama", "/llama", "a/b/llama"])
    def test_what_looks_like_a_path_is_one(self, given):
        assert Path(self.source(given)).is_absolute()

    def test_a_missing_folder_in_one_that_exists_is_no_hub_id(self, tmp_path):
        (tmp_path / "weights").mkdir()
        assert self.source("weights/lama") == str(tmp_path / "weights" / "lama")

    @pytest.mark.parametrize("given", ["gpt2", "meta-llama/Llama-3.1-8B", "s3://bucket/llama"])
    def test_hub_ids_and_urls_stay_as_they_are(self, given):
        assert self.source(given) == given


class TestResources:
    def test_a_cpu_engine_takes_one_cpu(self):
        assert resources(load(args())) == {"ray_actor_options": {"num_cpus": 1}}

    @pytest.mark.parametrize(
        ("wrong", "line"),
        [
            (engine(tensor_parallel_size=2), "tensor_parallel_size: 2 GPUs asked for"),
            (engine(pipeline_parallel_size=4), "pipeline_parallel_size: 4 GPUs asked for"),
            (model(accelerator_type="A10G"), "accelerator_type: 'A10G' asked for"),
        ],
    )
    def test_gpus_are_refused_on_a_cpu_build(self, wrong, line):
        with pytest.raises(ConfigError, match=line):
            load(wrong)


@pytest.mark.usefixtures("cuda_build")
class TestGpuResources:
    def test_an_emulated_engine_takes_none(self):
        emulated = args(engine={"emulated": {"profile": "a10-llama-7b"}})
        assert resources(load(emulated)) == {"ray_actor_options": {"num_cpus": 0.1}}

    def test_one_rank_lives_in_the_replica(self):
        actor = {"num_cpus": 1, "num_gpus": 1, "accelerator_type": "A10G"}
        assert resources(load(model(accelerator_type="A10G"))) == {"ray_actor_options": actor}

    def test_several_ranks_get_a_bundle_each(self):
        config = load(engine(tensor_parallel_size=2, pipeline_parallel_size=2))
        assert resources(config) == {
            "ray_actor_options": {"num_cpus": 1},
            "placement_group_bundles": [{"CPU": 1, "GPU": 1}, *[{"GPU": 1}] * 3],
            "placement_group_strategy": "PACK",
        }

    def test_every_bundle_is_on_the_kind_of_gpu_that_was_asked_for(self):
        kwargs = {"tensor_parallel_size": 2}
        options = resources(load(model(accelerator_type="A10G", engine_kwargs=kwargs)))
        kind = {"accelerator_type:A10G": 0.001}
        expected = [{"CPU": 1, "GPU": 1, **kind}, {"GPU": 1, **kind}]
        assert options["placement_group_bundles"] == expected

    def test_ray_workers_that_were_asked_for_get_bundles_even_if_it_is_one(self):
        options = resources(load(engine(distributed_executor_backend="ray")))
        assert options["placement_group_bundles"] == [{"CPU": 1, "GPU": 1}]

    def test_workers_that_are_the_replicas_processes_use_its_gpus(self):
        kwargs = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        assert resources(load(engine(**kwargs))) == {
            "ray_actor_options": {"num_cpus": 1, "num_gpus": 2}
        }

    @pytest.mark.parametrize("tensor", [1, 2, 4])
    def test_serve_accepts_them(self, tensor):
        """It wants the replica to fit into the first bundle."""
        kwargs = {"tensor_parallel_size": tensor}
        config = load(model(accelerator_type="A10G", engine_kwargs=kwargs))
        ReplicaConfig.create(lambda: None, **resources(config))


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(
    ("kwargs", "chosen"),
    [
        ({}, None),
        ({"tensor_parallel_size": 2}, "ray"),
        ({"pipeline_parallel_size": 2}, "ray"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": None}, "ray"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "mp"),
        ({"distributed_executor_backend": "uni"}, "uni"),
    ],
)
def test_several_workers_are_ray_actors_unless_the_user_says_otherwise(kwargs, chosen):
    assert executor(load(engine(**kwargs)).model) == chosen


def test_the_openai_servers_arguments_go_there_too():
    config = load(engine(enable_auto_tool_choice=True, tool_call_parser="hermes"))
    assert config.model.engine_kwargs["tool_call_parser"] == "hermes"
