import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app import check
from app import resources as app_resources
from app.validation import ConfigError

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A folder that holds a model, as far as a check looks."""
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


@pytest.fixture
def content(folder):
    """A valid file's content."""
    return {
        "http_options": {"port": 8000},
        "applications": [
            {
                "name": "llama",
                "route_prefix": "/",
                "import_path": "app.main:build_app",
                "args": {"model": {"model_id": "tiny", "model_source": str(folder)}},
                "deployments": [{"name": "Ingress", "num_replicas": 1}],
            }
        ],
    }


@pytest.fixture
def verdict(tmp_path):
    """What is said of a content, without the name of the file."""

    def verdict(content):
        file = tmp_path / "fleet.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        try:
            return f"ok: {check.check_file(file)}"
        except ConfigError as error:
            name, _, line = str(error).partition(": ")
            assert name == str(file)
            assert "\n" not in line
            return line

    return verdict


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(app_resources, "cpu_build", lambda: False)
    monkeypatch.setattr(check, "_gpus_there", lambda: 4)


def test_a_valid_file_is_summed_up(content, verdict):
    assert verdict(content) == "ok: tiny, 2 replicas"


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^nope.yaml: cannot be read: No such file"):
        check.check_file(Path("nope.yaml"))


def test_yaml_errors_name_the_line(verdict):
    assert verdict("a: 1\nb: [\nc: }") == "line 3: expected the node content, but found '}'"


@pytest.mark.parametrize("text", ["", "- a", "just text"])
def test_a_file_without_keys(verdict, text):
    assert verdict(text) == "must be a mapping with the key 'applications'"


def test_what_serve_rejects_is_said_in_one_line(content, verdict):
    content["applications"][0]["deployments"][0]["num_replicas"] = -1
    line = verdict(content)
    assert line.startswith("applications.llama.deployments.Ingress.num_replicas")
    assert "greater than 0" in line


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda content, app: content.update(http_option={}),
            "http_option: unknown key; did you mean 'http_options'?",
        ),
        (
            lambda content, app: content["http_options"].update(prot=1),
            "http_options.prot: unknown key; did you mean 'port'?",
        ),
        (
            lambda content, app: app.update(argss={}),
            "applications.llama.argss: unknown key; did you mean 'args'?",
        ),
        (
            lambda content, app: app["deployments"][0].update(num_replica=2),
            "applications.llama.deployments.Ingress.num_replica:"
            " unknown key; did you mean 'num_replicas'?",
        ),
        (
            lambda content, app: app["deployments"][0].update(ray_actor_options={"num_cpu": 1}),
            "applications.llama.deployments.Ingress.ray_actor_options.num_cpu:"
            " unknown key; did you mean 'num_cpus'?",
        ),
        (
            lambda content, app: app["deployments"][0].update(
                autoscaling_config={"min_replica": 1}
            ),
            "applications.llama.deployments.Ingress.autoscaling_config.min_replica:"
            " unknown key; did you mean 'min_replicas'?",
        ),
    ],
)
def test_keys_that_serve_would_ignore_are_named(content, verdict, change, line):
    change(content, content["applications"][0])
    assert verdict(content) == line


def test_free_mappings_are_not_judged(content, verdict):
    deployment = content["applications"][0]["deployments"][0]
    deployment["user_config"] = {"anything": 1}
    deployment["ray_actor_options"] = {"resources": {"rack": 1}}
    assert verdict(content).startswith("ok")


def test_a_wrong_argument_is_named_with_its_application(content, verdict):
    content["applications"][0]["args"]["replicsa"] = 3
    assert verdict(content) == (
        "applications.llama.args.replicsa: unknown key; did you mean 'replicas'?"
    )


def test_an_override_of_an_unknown_deployment(content, verdict):
    content["applications"][0]["deployments"][0]["name"] = "LLMReplca"
    assert verdict(content) == (
        "applications.llama.deployments.LLMReplca: the fleet has no such deployment;"
        " did you mean 'LLMReplica'?"
    )


@pytest.mark.parametrize("path", ["app.main:biuld_app", "ap.main:build_app"])
def test_a_misspelt_import_path(content, verdict, path):
    content["applications"][0]["import_path"] = path
    assert verdict(content) == (
        f"applications.llama.import_path: {path!r} is not found from here;"
        " did you mean 'app.main:build_app'?"
    )


def test_other_applications_are_left_to_serve(content, verdict):
    remote = {"import_path": "not_here:app", "runtime_env": {"working_dir": "s3://bucket/code"}}
    content["applications"] = [
        {"name": "other", "import_path": "json:loads", "route_prefix": "/a", "args": {"any": 1}},
        remote | {"name": "remote", "route_prefix": "/b"},
    ]
    assert verdict(content) == "ok: no application of ours"


class TestModel:
    def test_a_missing_folder(self, content, verdict, folder):
        content["applications"][0]["args"]["model"]["model_source"] = f"{folder}y"
        assert verdict(content) == (
            f"applications.llama.args.model.model_source: no folder {folder}y; did you mean 'tiny'?"
        )

    def test_a_folder_without_a_model(self, content, verdict, folder):
        (folder / "config.json").unlink()
        assert verdict(content) == (
            f"applications.llama.args.model.model_source: {folder} holds no config.json,"
            " so no model"
        )

    def test_a_hub_id_that_cannot_be_looked_up(self, content, verdict, monkeypatch):
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", raiser(OSError("no network")))
        content["applications"][0]["args"]["model"]["model_source"] = "org/llama"
        assert verdict(content).startswith(
            "applications.llama.args.model.model_source: 'org/llama' is no folder here,"
        )

    def test_a_hub_id_that_the_hub_knows(self, content, verdict, monkeypatch):
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
        content["applications"][0]["args"]["model"]["model_source"] = "org/llama"
        assert verdict(content).startswith("ok")


@pytest.mark.usefixtures("four_gpus")
class TestGpus:
    @pytest.mark.parametrize(
        ("replicas", "engine_kwargs", "override", "wanted"),
        [
            (4, {}, {}, None),
            (5, {}, {}, 5),
            (2, {"tensor_parallel_size": 2}, {}, None),
            (2, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {}, 8),
            (5, {}, {"num_replicas": 4}, None),
            (1, {}, {"num_replicas": 6}, 6),
            (8, {}, {"ray_actor_options": {"num_gpus": 0.5}}, None),
            (2, {"tensor_parallel_size": 4}, {"ray_actor_options": {"num_cpus": 1}}, 8),
            (3, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, {}, 6),
            (2, {}, {"placement_group_bundles": [{"CPU": 1, "GPU": 1}, {"GPU": 2}]}, 6),
            (5, {}, {"autoscaling_config": {"min_replicas": 1, "max_replicas": 9}}, None),
        ],
    )
    def test_replicas_times_gpus_must_be_there(
        self, content, verdict, replicas, engine_kwargs, override, wanted
    ):
        application = content["applications"][0]
        application["args"]["replicas"] = replicas
        application["args"]["model"]["engine_kwargs"] = engine_kwargs
        application["deployments"] = [{"name": "LLMReplica"} | override]
        line = verdict(content)
        if wanted is None:
            assert line.startswith("ok")
        else:
            assert line == f"{wanted} GPUs are asked for by the replicas, but 4 are there"

    def test_actor_options_that_would_take_the_gpu_away_are_an_error(self, content, verdict):
        application = content["applications"][0]
        application["deployments"] = [{"name": "LLMReplica", "ray_actor_options": {"num_cpus": 4}}]
        assert verdict(content) == (
            "applications.llama.deployments.LLMReplica.ray_actor_options: these are instead of"
            " ours, so they need num_gpus, too (ours: 1)"
        )
        application["args"]["model"]["accelerator_type"] = "L4"
        application["deployments"][0]["ray_actor_options"]["num_gpus"] = 1
        assert verdict(content).endswith("they need accelerator_type, too (ours: L4)")

    def test_applications_share_them(self, content, verdict):
        first = content["applications"][0]
        first["args"]["replicas"] = 3
        content["applications"].append(first | {"name": "second", "route_prefix": "/second"})
        assert verdict(content) == "6 GPUs are asked for by the replicas, but 4 are there"

    def test_a_scaled_fleet_wants_those_it_begins_with(self, content, verdict):
        args = content["applications"][0]["args"]
        args["autoscaling"] = {"min": 3, "max": 8}
        assert verdict(content) == "ok: tiny, 3 to 8 replicas"
        args["autoscaling"]["initial"] = 5
        assert verdict(content) == "5 GPUs are asked for by the replicas, but 4 are there"


def test_gpus_given_to_a_cpu_engine_must_be_there_too(content, verdict, monkeypatch):
    monkeypatch.setattr(check, "_gpus_there", lambda: 0)
    content["applications"][0]["deployments"] = [
        {"name": "LLMReplica", "ray_actor_options": {"num_gpus": 1}}
    ]
    assert verdict(content) == "2 GPUs are asked for by the replicas, but 0 are there"


class TestValidateArgs:
    """The builder's check, which Serve runs inside the cluster."""

    def test_it_returns_the_configuration(self, folder):
        args = {"model": {"model_id": "tiny", "model_source": str(folder)}}
        assert check.validate_args(args).model.model_source == str(folder)

    def test_a_missing_folder_is_an_error_on_a_single_machine(self, folder):
        args = {"model": {"model_id": "tiny", "model_source": f"{folder}y"}}
        with pytest.raises(ConfigError, match=r"^model\.model_source: no folder"):
            check.validate_args(args)

    @pytest.mark.usefixtures("four_gpus")
    def test_of_missing_gpus_it_warns(self, folder, caplog):
        """The file's `deployments:` may ask for less, and is not seen where Serve builds."""
        args = {"model": {"model_id": "tiny", "model_source": str(folder)}, "replicas": 9}
        assert check.validate_args(args).replicas == 9
        assert "9 GPUs are asked for by the replicas, but 4 are there" in caplog.text

    @pytest.mark.usefixtures("four_gpus")
    def test_in_a_cluster_that_may_grow_they_are_waited_for(self, folder, monkeypatch):
        monkeypatch.setattr(check, "_single_machine", lambda: False)
        args = {"model": {"model_id": "tiny", "model_source": f"{folder}y"}, "replicas": 9}
        assert check.validate_args(args).replicas == 9


def test_the_command_prints_one_line_and_fails(tmp_path):
    file = tmp_path / "fleet.yaml"
    file.write_text("applications: []\nproxy_locatoin: EveryNode\n")
    ran = subprocess.run(
        [sys.executable, "-m", "app", "check", str(file)],
        cwd=PROJECT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr == (f"{file}: proxy_locatoin: unknown key; did you mean 'proxy_location'?\n")


def raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail
