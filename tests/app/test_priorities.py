"""Which class a request is in: what it asks for, and what its caller may have."""

import pytest

from app.config import ModelConfig, PriorityClass
from app.priorities import Priorities

CLASSES = Priorities(
    {
        "normal": PriorityClass(),
        "high": PriorityClass(priority=-10),
        "urgent": PriorityClass(priority=-20, api_keys=["of-urgent", "of-both"]),
        "batch": PriorityClass(priority=10, api_keys=["of-batch", "of-both"]),
    }
)


def placed(
    key: str = "", named: str | None = None, priority: int = 0, classes: Priorities = CLASSES
) -> tuple[str, int]:
    return classes.place(classes.caller(f"Bearer {key}"), named, priority)


def test_who_asks_for_nothing_is_normal():
    assert placed() == ("normal", 0)
    assert placed("unheard-of") == ("normal", 0)


def test_a_key_gives_its_class_of_several_the_most_urgent():
    assert placed("of-urgent") == ("urgent", -20)
    assert placed("of-batch") == ("batch", 10)
    assert placed("of-both") == ("urgent", -20)


def test_the_header_comes_before_the_body_and_the_body_before_the_key():
    assert placed("of-urgent", named="high", priority=-20) == ("high", -10)
    assert placed("of-urgent", named="normal") == ("normal", 0)
    assert placed("of-urgent", priority=-10) == ("high", -10)


def test_a_class_without_keys_is_open_to_everybody():
    for key in ("", "of-batch", "of-urgent"):
        assert placed(key, named="high") == ("high", -10)


def test_a_class_that_the_caller_may_not_use_becomes_the_next_less_urgent_one():
    assert placed(named="urgent") == ("high", -10)
    assert placed("of-batch", named="urgent") == ("high", -10)


def test_where_none_is_less_urgent_it_becomes_the_least_urgent():
    assert placed(named="batch") == ("normal", 0)


@pytest.mark.parametrize(
    ("key", "priority", "place"),
    [
        ("", -21, ("high", -10)),
        ("", -10, ("high", -10)),
        ("", -9, ("normal", -9)),  # before other normal ones, but not urgent enough for headroom
        ("", 5, ("normal", 5)),
        ("of-urgent", -1000, ("urgent", -20)),
        ("of-urgent", -15, ("high", -15)),
        ("of-batch", 5, ("batch", 5)),
        ("of-batch", 99, ("batch", 99)),
    ],
)
def test_a_number_falls_into_the_most_urgent_class_that_it_is_urgent_enough_for(
    key, priority, place
):
    assert placed(key, priority=priority) == place


def test_a_normal_class_need_not_be_of_priority_0():
    classes = Priorities({"normal": PriorityClass(priority=5), "low": PriorityClass(priority=9)})
    assert placed(classes=classes) == ("normal", 5)
    assert placed(priority=-1, classes=classes) == ("normal", 5)


def test_of_classes_that_are_equally_urgent_a_number_means_the_first():
    classes = Priorities(
        {"normal": PriorityClass(), "a": PriorityClass(priority=1), "b": PriorityClass(priority=1)}
    )
    assert placed(priority=1, classes=classes) == ("a", 1)
    assert placed(named="b", classes=classes) == ("b", 1)


def test_keys_are_not_kept():
    assert "of-urgent" not in repr(vars(CLASSES)["_callers"])


@pytest.mark.parametrize(("of_vllm", "expected"), [(None, None), ("all", ["all", "sk-high"])])
def test_where_vllm_asks_for_a_key_those_of_classes_open_it_too(monkeypatch, of_vllm, expected):
    from app.openai_app import server_args  # imports vLLM, which takes seconds

    if of_vllm:
        monkeypatch.setenv("VLLM_API_KEY", of_vllm)
    model = ModelConfig(model_id="tiny", model_source="org/tiny")
    assert server_args(model, ["sk-high"]).api_key == expected


@pytest.mark.parametrize(("priority", "patient"), [(-5, False), (0, False), (7, True)])
def test_a_request_less_urgent_than_its_class_lets_the_others_pass(priority, patient):
    assert CLASSES.is_patient("normal", priority) == patient
