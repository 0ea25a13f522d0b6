"""Public traces, each in its published format, and what is wrong in a broken one."""

import json

import pytest

from load_tests.traces.files import load_trace, rough_tokens
from load_tests.traces.trace import TraceError, TraceRequest

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118.5,GPT-4,417,276,693,API log
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 655, "output_length": 26, "hash_ids": [46]}
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 23:59:59.500000+00:00,2162,5
2024-05-11 00:00:01.000000+00:00,2399,6
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


def conversation(*messages):
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in messages]}


def test_burstgpt_without_its_failures(write):
    assert load_trace(write("trace.csv", BURSTGPT), "burstgpt") == [
        TraceRequest(0.0, 472, 18),
        TraceRequest(113.5, 417, 276),
    ]


def test_mooncake(write):
    first, second = load_trace(write("trace.jsonl", MOONCAKE), "mooncake")
    assert first == TraceRequest(0.0, 6955, 52)
    assert (second.at, second.input_tokens) == (pytest.approx(3.053), 655)


def test_azure(write):
    first, second = load_trace(write("trace.csv", AZURE), "azure")
    assert first == TraceRequest(0.0, 4808, 10)
    assert second.at == pytest.approx(0.052, abs=1e-5)


def test_azure_with_time_zones_over_midnight(write):
    trace = load_trace(write("trace.csv", AZURE_2024), "azure")
    assert [request.at for request in trace] == [0.0, 1.5]


def test_azure_as_json_lines(write):
    lines = '{"TIMESTAMP": "2023-11-16 18:00:00", "ContextTokens": 7, "GeneratedTokens": 8}\n\n'
    assert load_trace(write("trace.jsonl", lines), "azure") == [TraceRequest(0.0, 7, 8)]


def test_sharegpt_takes_the_first_question_and_answer(write):
    entries = [
        conversation(("human", "a" * 40), ("gpt", "b" * 20), ("human", "c"), ("gpt", "d")),
        conversation(("system", "be nice"), ("user", "e" * 4), ("assistant", "f" * 5)),
        conversation(("gpt", "nobody asked")),
        conversation(("human", "a"), ("gpt", "")),
        conversation(),
    ]
    trace = load_trace(write("trace.json", json.dumps(entries)), "sharegpt")
    assert trace == [TraceRequest(0.0, 10, 5), TraceRequest(0.0, 1, 2)]


def test_sharegpt_with_a_tokenizer(write):
    file = write("trace.json", json.dumps([conversation(("human", "a b c"), ("gpt", "d e"))]))
    assert load_trace(file, "sharegpt", lambda text: len(text.split())) == [TraceRequest(0.0, 3, 2)]


def test_rough_tokens():
    assert [rough_tokens(text) for text in ("", "a", "abcd", "abcde")] == [0, 1, 1, 2]


def test_requests_come_by_time(write):
    header, *rows = BURSTGPT.splitlines(keepends=True)
    trace = load_trace(write("trace.csv", header + "".join(reversed(rows))), "burstgpt")
    assert [request.at for request in trace] == [0.0, 113.5]


@pytest.mark.parametrize(
    ("name", "text", "format", "problem"),
    [
        ("t.csv", BURSTGPT.replace(",276,", ",many,"), "burstgpt", ":4: 'Response tokens' cannot"),
        ("t.csv", BURSTGPT.replace("118.5", "nan"), "burstgpt", ":4: 'Timestamp' cannot be 'nan'"),
        ("t.csv", BURSTGPT.replace("472", "-472"), "burstgpt", ":2: 'Request tokens' cannot"),
        ("t.csv", BURSTGPT + "120,GPT-4\n", "burstgpt", ":5: 'Request tokens' cannot be None"),
        ("t.csv", AZURE, "burstgpt", ":2: has no 'Timestamp'"),
        ("t.csv", AZURE.replace("18:17:04", "later"), "azure", ":3: 'TIMESTAMP' cannot be"),
        ("t.jsonl", MOONCAKE + "{", "mooncake", ":3: no JSON"),
        ("t.jsonl", MOONCAKE + "7", "mooncake", ":3: must have keys"),
        ("t.jsonl", MOONCAKE.replace("655,", "1e999,"), "mooncake", ":2: 'input_length' cannot"),
        ("t.json", '[\n{"id": 1},\n}', "sharegpt", ":3: no JSON"),
        ("t.json", '[{"id": 1}]', "sharegpt", ": conversation 1: has no 'conversations'"),
        ("t.json", '[{"conversations": ["hi"]}]', "sharegpt", ": conversation 1: must have keys"),
        ("t.json", "{}", "sharegpt", ": must be a list"),
        ("t.csv", BURSTGPT.splitlines()[0], "burstgpt", ": no request"),
    ],
)
def test_what_is_wrong_and_where(write, name, text, format, problem):
    with pytest.raises(TraceError) as caught:
        load_trace(write(name, text), format)
    message = str(caught.value)
    assert f"{name}{problem}" in message
    assert "\n" not in message


def test_no_such_file(tmp_path):
    with pytest.raises(TraceError, match=r"gone\.csv: No such file"):
        load_trace(tmp_path / "gone.csv", "azure")


def test_not_a_text_file(tmp_path):
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not a text file"):
        load_trace(tmp_path / "trace.csv", "azure")
