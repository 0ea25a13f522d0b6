"""What all engines are told, and which of them a request can move between."""

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from app.config import EngineConfig, ModelConfig
from deployments.engine_config import build, fingerprint

VLLM = EngineConfig()
EMULATED = EngineConfig.model_validate({"emulated": {"profile": "a10-llama-7b"}})


def model(source: str = "org/model", name: str = "chat", **engine_kwargs: object) -> ModelConfig:
    return ModelConfig(model_id=name, model_source=source, engine_kwargs=engine_kwargs)


@pytest.mark.parametrize(
    ("changed", "engine"),
    [
        (model("org/another"), VLLM),
        (model(block_size=32), VLLM),
        (model(dtype="float32"), VLLM),
        (model(), EMULATED),
    ],
)
def test_what_decides_tokens_or_the_layout_of_the_kv_changes_it(changed, engine):
    assert fingerprint(changed, engine) != fingerprint(model(), VLLM)


@pytest.mark.parametrize("changed", [model(name="other"), model(chat_template="other.jinja")])
def test_what_only_the_front_end_knows_does_not(changed):
    assert fingerprint(changed, VLLM) == fingerprint(model(), VLLM)


def test_the_order_of_arguments_does_not():
    either, other = model(block_size=32, seed=1), model(seed=1, block_size=32)
    assert fingerprint(either, VLLM) == fingerprint(other, VLLM)


def test_no_engine_counts_on_an_image_that_another_one_was_sent(monkeypatch):
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", lambda self, _: self)
    assert build(model(), VLLM).mm_processor_cache_gb == 0
