"""Profiles: the latency model by numbers that can be worked out in one's head, and broken files."""

import json

import msgspec
import pytest

from deployments.emulated.profile import PROFILES, Profile, ProfileError, load_profile

NUMBERS = {
    "weights_s": 0.016,
    "token_s": 0.001,
    "context_s": 0.0001,
    "pair_s": 0.00001,
    "copy_s": 0.01,
    "copy_token_s": 0.002,
    "blocks": 100,
    "block_size": 16,
}
PROFILE = msgspec.convert(NUMBERS, Profile)


@pytest.fixture
def file(tmp_path):
    def file(text):
        (tmp_path / "mine.json").write_text(text)
        return str(tmp_path / "mine.json")

    return file


def test_few_tokens_take_as_long_as_reading_the_weights():
    assert PROFILE.step_s(1, 0, 0) == PROFILE.step_s(16, 0, 0) == 0.016


def test_many_tokens_take_as_long_as_computing_them():
    assert PROFILE.step_s(40, 0, 0) == pytest.approx(0.040)


@pytest.mark.parametrize(("tokens", "least"), [(4, 0.016), (40, 0.040)])
def test_attention_is_on_top_of_both(tokens, least):
    assert PROFILE.step_s(tokens, 100, 0) == pytest.approx(least + 0.010)
    assert PROFILE.step_s(tokens, 0, 1000) == pytest.approx(least + 0.010)
    assert PROFILE.step_s(tokens, 100, 1000) == pytest.approx(least + 0.020)


def test_a_step_without_tokens_takes_no_time():
    assert PROFILE.step_s(0, 0, 0) == 0


def test_a_copy_takes_its_setup_and_time_for_each_token():
    assert PROFILE.copy_time_s(0) == 0.01
    assert PROFILE.copy_time_s(100) == pytest.approx(0.21)


@pytest.mark.parametrize("name", [file.stem for file in PROFILES.glob("*.json")])
def test_profiles_of_the_project_load_by_name(name):
    assert load_profile(name).source


def test_any_other_file_is_given_by_its_path(file):
    assert load_profile(file(json.dumps(NUMBERS))) == PROFILE


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ProfileError) as error:
        load_profile("a10-lama-7b")
    assert str(error.value).startswith("'a10-lama-7b' is no profile and no file; profiles: ")
    assert "a10-llama-7b, " in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "mine.json: Input data was truncated"),
        ("[]", "mine.json: Expected `object`, got `array`"),
        (json.dumps(NUMBERS | {"blocks": "many"}), "mine.json: Expected `int`, got `str`"),
        (json.dumps(NUMBERS | {"bloks": 1}), "mine.json: Object contains unknown field `bloks`"),
        ('{"weights_s": 1}', "mine.json: Object missing required field"),
        (json.dumps(NUMBERS | {"blocks": 0}), "mine.json: blocks must be more than 0"),
        (json.dumps(NUMBERS | {"pair_s": -1e-9}), "mine.json: pair_s must be 0 or more"),
        (json.dumps(NUMBERS | {"max_batch": 9999}), "mine.json: max_step_tokens must be at least"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(file, text, says):
    with pytest.raises(ProfileError) as error:
        load_profile(file(text))
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)
