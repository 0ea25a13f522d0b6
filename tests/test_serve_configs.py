"""Every YAML file that is shipped is one that Serve and the fleet accept."""

from pathlib import Path

import pytest
import yaml

from app import check
from app import resources as app_resources

CONFIGS = Path(__file__).parents[1] / "serve_configs"
PLAIN = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def big_machine(request, monkeypatch):
    """GPUs, models and vLLM's CUDA build, where a file is meant for such."""
    if "llama.yaml" not in request.node.name:
        monkeypatch.setattr(app_resources, "cpu_build", lambda: False)
        monkeypatch.setattr(check, "_gpus_there", lambda: 64)
    monkeypatch.setattr(check, "_check_model", lambda config: None)


def ours(tmp_path, applications):
    """The applications of another system's file, as a Serve YAML file."""
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": applications}))
    return file


@pytest.mark.parametrize("file", PLAIN, ids=lambda path: path.name)
def test_serve_configs(file):
    assert "replicas" in check.check_file(file)


def test_kuberay(tmp_path):
    content = yaml.safe_load((CONFIGS / "kuberay" / "rayservice.yaml").read_text())
    serve = yaml.safe_load(content["spec"]["serveConfigV2"])
    assert "replicas" in check.check_file(ours(tmp_path, serve["applications"]))


def test_a_pod_lives_longer_than_a_drain():
    content = yaml.safe_load((CONFIGS / "kuberay" / "rayservice.yaml").read_text())
    (application,) = yaml.safe_load(content["spec"]["serveConfigV2"])["applications"]
    (replica,) = (each for each in application["deployments"] if each["name"] == "LLMReplica")
    for group in content["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace > replica["graceful_shutdown_timeout_s"]


def test_anyscale(tmp_path):
    content = yaml.safe_load((CONFIGS / "anyscale" / "service.yaml").read_text())
    assert "replicas" in check.check_file(ours(tmp_path, content["applications"]))
