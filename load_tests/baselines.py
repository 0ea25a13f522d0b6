"""The policies that are compared, each as `args` of the fleet (Llumnix, OSDI'24, section 6.1)."""

from collections.abc import Mapping
from typing import Any

_STAY = {"enabled": False}

BASELINES: Mapping[str, Mapping[str, Any]] = {
    "round_robin": {"dispatch": "round_robin", "migration": _STAY},
    "power_of_two": {"dispatch": "power_of_two", "migration": _STAY},
    "queue": {"dispatch": "queue", "migration": _STAY},
    # INFaaS++: dispatch by load, that of queued requests included, and nothing moves.
    "infaas": {"dispatch": "freeness", "migration": _STAY},
    # Llumnix-base: to it, all requests are alike.
    "llumnix_base": {
        "dispatch": "freeness",
        "migration": {"enabled": True},
        "priorities": {"high": {"priority": 0, "headroom_tokens": 0}},
    },
    "llumnix": {"dispatch": "freeness", "migration": {"enabled": True}},
}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`; mappings in both are merged in turn."""
    merged = {**base, **changes}
    for key in base.keys() & changes.keys():
        if isinstance(base[key], Mapping) and isinstance(changes[key], Mapping):
            merged[key] = merge(base[key], changes[key])
    return merged
