"""Public traces, in the formats in which they were published.

    trace = load_trace(Path("BurstGPT_1.csv"), "burstgpt")  # a TraceError is one line

- sharegpt: JSON, conversations without times. The first message of a human and the answer to it
  make a request, as in vLLM's benchmark.
- burstgpt: CSV (github.com/HPMLL/BurstGPT), times in seconds.
- mooncake: JSON lines (github.com/kvcache-ai/Mooncake), times in milliseconds.
- azure: CSV (github.com/Azure/AzurePublicDataset, LLM inference 2023 and 2024) with dates, or JSON
  lines with the same keys.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from load_tests.traces.trace import TraceError, TraceRequest

Format = Literal["sharegpt", "burstgpt", "mooncake", "azure"]
TIMED: tuple[Format, ...] = ("burstgpt", "mooncake", "azure")

CountTokens = Callable[[str], int]
T = TypeVar("T")


def rough_tokens(text: str) -> int:
    """An estimate that needs no tokenizer: four characters a token, as in English on average."""
    return math.ceil(len(text) / 4)


def load_trace(
    file: Path, format: Format, count_tokens: CountTokens = rough_tokens
) -> list[TraceRequest]:
    """The requests of a trace by time, from 0 on (always 0 in formats without times).

    Left out are those without input or output, such as requests that failed. `count_tokens` is
    for formats that have text. Raises TraceError.
    """
    try:
        trace = [
            _parse(where, record, format, count_tokens) for where, record in _read(file, format)
        ]
    except OSError as error:
        raise TraceError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{file}: not a text file") from None
    except csv.Error as error:
        raise TraceError(f"{file}: {error}") from None
    served = sorted(
        (request for request in trace if request.input_tokens and request.output_tokens),
        key=lambda request: request.at,
    )
    if not served:
        raise TraceError(f"{file}: no request that has input and output")
    return [replace(request, at=request.at - served[0].at) for request in served]


def _read(file: Path, format: Format) -> Iterator[tuple[str, Any]]:
    """Records, and where they are for a person who looks for them."""
    if format == "sharegpt":
        return _json_entries(file)
    if format == "mooncake" or file.suffix == ".jsonl":
        return _json_lines(file)
    return _csv_rows(file)


def _csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text)
        for row in rows:
            yield f"{file}:{rows.line_num}", row


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            if line.strip():
                yield f"{file}:{number}", _json(file, line, number)


def _json_entries(file: Path) -> Iterator[tuple[str, Any]]:
    entries = _json(file, file.read_text(encoding="utf-8-sig"))
    if not isinstance(entries, list):
        raise TraceError(f"{file}: must be a list of conversations")
    for number, entry in enumerate(entries, start=1):
        yield f"{file}: conversation {number}", entry


def _json(file: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceError(f"{file}:{line + error.lineno - 1}: no JSON: {error.msg}") from None


def _parse(where: str, record: Any, format: Format, count_tokens: CountTokens) -> TraceRequest:
    try:
        match format:
            case "sharegpt":
                return _sharegpt(record, count_tokens)
            case "burstgpt":
                return _row(record, "Timestamp", _number, "Request tokens", "Response tokens")
            case "mooncake":
                return _row(record, "timestamp", _milliseconds, "input_length", "output_length")
            case "azure":
                return _row(record, "TIMESTAMP", _date, "ContextTokens", "GeneratedTokens")
    except TraceError as error:
        raise TraceError(f"{where}: {error}") from None


def _sharegpt(record: Any, count_tokens: CountTokens) -> TraceRequest:
    messages = [
        (_get(message, "from", str), _get(message, "value", str))
        for message in _get(record, "conversations", list)
    ]
    for (asker, question), (answerer, answer) in pairwise(messages):
        if asker in ("human", "user") and answerer in ("gpt", "assistant"):
            return TraceRequest(0.0, count_tokens(question), count_tokens(answer))
    return TraceRequest(0.0, 0, 0)


def _row(
    record: Any, at: str, seconds: Callable[[Any], float], inputs: str, outputs: str
) -> TraceRequest:
    return TraceRequest(
        at=_get(record, at, seconds),
        input_tokens=_get(record, inputs, _count),
        output_tokens=_get(record, outputs, _count),
    )


def _get(record: Any, key: str, convert: Callable[[Any], T]) -> T:
    if not isinstance(record, Mapping):
        raise TraceError(f"must have keys, but is {record!r:.40}")
    if key not in record:
        raise TraceError(f"has no {key!r}")
    try:
        return convert(record[key])
    except (TypeError, ValueError, OverflowError):
        raise TraceError(f"{key!r} cannot be {record[key]!r:.40}") from None


def _count(value: Any) -> int:
    count = int(value)
    if count < 0:
        raise ValueError
    return count


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _milliseconds(value: Any) -> float:
    return _number(value) / 1000


def _date(value: Any) -> float:
    # A file's dates are all of one time zone, so that it can be left out of account.
    return datetime.fromisoformat(value).replace(tzinfo=UTC).timestamp()
