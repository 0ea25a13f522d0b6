"""Fixtures that several of this package's tests share."""

from collections.abc import Callable

import pytest

from app.config import RecoveryConfig
from tests.app.ingress import Ingress, in_virtual_time


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ingress]:
    """Makes an ingress in virtual time; it takes the keys of `recovery` in the YAML."""

    def start(replicas: str = "ab", **recovery: float) -> Ingress:
        in_virtual_time(monkeypatch)
        return Ingress(RecoveryConfig.model_validate(recovery), replicas=replicas)

    return start
