import filecmp

import pytest

from app import tiny_model


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build") / "tiny"
    tiny_model.build(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(fresh):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fresh)


@pytest.fixture(scope="module")
def complete(fresh, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(fresh)

    def complete(prompt, tokens=64):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return out[0, ids.shape[1] :].tolist()

    return complete


def test_two_builds_hold_the_same_bytes(fresh, tmp_path):
    again = tmp_path / "again"
    tiny_model.build(again)
    names = sorted(path.name for path in fresh.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert filecmp.cmpfiles(fresh, again, names, shallow=False) == (names, [], [])


def test_an_existing_folder_is_left_as_it_is(fresh):
    before = {path: path.stat().st_mtime_ns for path in fresh.iterdir()}
    with pytest.raises(FileExistsError):
        tiny_model.build(fresh)
    assert {path: path.stat().st_mtime_ns for path in fresh.iterdir()} == before


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(tiny_model, "_write_model", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_model.build(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["hello", "héllo 世界 🦙", "\x00\x7f \t\r\n", " a  b ", ""])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_chat_becomes_one_prompt(tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<s>[user] Hi\n[assistant] "


def test_greedy_output_varies_and_can_be_read(complete):
    tokens = complete("Hello", tokens=200)
    assert len(tokens) == 200
    assert len(set(tokens)) > 50
    assert set(tokens) <= set(tiny_model.PRINTABLE)


def test_greedy_output_depends_on_the_far_past(complete):
    """Or else a KV block that was lost in a move would go unnoticed."""
    prompt = "x" * 700
    assert complete("y" * 32 + prompt, 8) != complete("z" * 32 + prompt, 8)
