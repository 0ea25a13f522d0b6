"""Fixtures that several of this package's tests share."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes an ingress in virtual time; it takes the keys of `recovery` in the YAML."""
    from app.config import RecoveryConfig
    from tests.app.ingress import Ingress, in_virtual_time

    def start(replicas: str = "ab", **recovery: float) -> Ingress:
        in_virtual_time(monkeypatch)
        return Ingress(RecoveryConfig(**recovery), replicas=replicas)

    return start
