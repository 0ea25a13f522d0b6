"""A scenario: a trace, the rates at which it arrives, and the policies that are to serve it.

scenario = load_scenario("m-m")  # load_tests/scenarios/m-m.yaml; a ScenarioError is one line
for rate in scenario.rates:
    trace = scenario.trace_at(rate)
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.config import FleetConfig, NonEmpty, Section, default_priorities, load
from app.validation import ConfigError, hint, problem
from load_tests.baselines import BASELINES, merge
from load_tests.traces.files import TIMED, Format, load_trace
from load_tests.traces.lengths import CAP, INPUTS, OUTPUTS
from load_tests.traces.trace import (
    TraceError,
    TraceRequest,
    arriving,
    at_rate,
    picked,
    prioritized,
    synthetic,
)

SCENARIOS = Path(__file__).parent / "scenarios"

# What `args` may not set, and the scenario's key that does.
SET_ELSEWHERE = {
    ("replicas",): "instances",
    ("autoscaling", "max"): "instances",
    ("engine",): "profile",
    ("dispatch",): "policies",
    ("migration", "enabled"): "policies",
}

# The paper's clients wait, however long the queue.
UNBOUNDED = {"max_queued_tokens": None, "max_queue_s": None}


class ScenarioError(ValueError):
    """One line: the file, the key by its dotted path, and what is wrong with it."""


class LengthsConfig(Section):
    """Lengths drawn from distributions of the paper."""

    input: str = Field(description="a distribution of load_tests/traces/lengths.py")
    output: str = Field(description="another, or the same")

    @field_validator("input", "output")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        return _one_of(INPUTS if info.field_name == "input" else OUTPUTS, name)


class FileConfig(Section):
    """Lengths, and arrivals where it has them, of a public trace."""

    file: NonEmpty = Field(description="relative ones from the current folder")
    format: Format = Field(description="as load_tests/traces/files.py has them")
    cap: int = Field(default=CAP, ge=1, description="tokens; longer inputs and outputs are cut")

    @cached_property
    def requests(self) -> list[TraceRequest]:
        """All of the file's requests. Raises TraceError."""
        return [
            TraceRequest(r.at, min(r.input_tokens, self.cap), min(r.output_tokens, self.cap))
            for r in load_trace(Path(self.file), self.format)
        ]


class ArrivalsConfig(Section):
    """When requests arrive."""

    process: Literal["poisson", "gamma", "recorded"] = Field(
        default="poisson", description="recorded: as in the file, stretched to the rate"
    )
    cv: float = Field(default=1.0, gt=0, description="the gamma process's coefficient of variation")

    @model_validator(mode="after")
    def _cv_is_used(self) -> Self:
        if self.process != "gamma" and self.cv != 1:
            raise ValueError(f"cv: {self.process} arrivals take none; those of process gamma do")
        return self


def _source(value: Any) -> str:
    is_file = isinstance(value, FileConfig) or (isinstance(value, Mapping) and "file" in value)
    return "<file>" if is_file else "<lengths>"


Source = Annotated[
    Annotated[LengthsConfig, Tag("<lengths>")] | Annotated[FileConfig, Tag("<file>")],
    Discriminator(_source),
]


class Scenario(Section):
    """What is run: every policy at every rate."""

    name: NonEmpty = Field(description="what the results call it; the file's name by default")
    trace: Source = Field(description="where the lengths of requests come from")
    high_priority: float = Field(
        default=0.0, ge=0, le=1, description="share of requests with priority `high`"
    )
    arrivals: ArrivalsConfig = Field(
        default_factory=ArrivalsConfig, description="when requests arrive"
    )
    requests: int = Field(ge=2, description="requests at each rate")
    rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="requests/s over all instances"
    )
    instances: int = Field(
        default=16, ge=1, description="replicas of the fleet; the most of them, if `args` scale it"
    )
    profile: NonEmpty = Field(
        default="a10-llama-7b", description="what the emulated engines are, in load_tests/profiles"
    )
    policies: list[str] = Field(
        default_factory=lambda: list(BASELINES),
        min_length=1,
        description="of load_tests/baselines.py",
    )
    seed: int = Field(default=0, ge=0, description="of all that is drawn at random")
    args: dict[str, Any] = Field(
        default_factory=dict, description="changes to the fleet's `args`, for all policies"
    )
    variants: dict[NonEmpty, dict[str, Any]] = Field(
        default_factory=dict,
        description="further changes to `args`, by name; each makes a scenario NAME@VARIANT",
    )

    @field_validator("rates")
    @classmethod
    def _each_once(cls, rates: list[float]) -> list[float]:
        if len(set(rates)) < len(rates):
            raise ValueError("each rate once: results are kept by rate")
        return rates

    @field_validator("policies")
    @classmethod
    def _known(cls, policies: list[str]) -> list[str]:
        return [_one_of(BASELINES, policy) for policy in policies]

    @field_validator("args", "variants")
    @classmethod
    def _leave_to_others(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for changes in [args] if info.field_name == "args" else args.values():
            for path, key in SET_ELSEWHERE.items():
                if _has(changes, path):
                    raise ValueError(f"{'.'.join(path)} cannot be set here, {key!r} does that")
        return args

    @model_validator(mode="after")
    def _has_times(self) -> Self:
        timed = isinstance(self.trace, FileConfig) and self.trace.format in TIMED
        if self.arrivals.process == "recorded" and not timed:
            raise ValueError(f"arrivals.process: recorded needs a file of {', '.join(TIMED)}")
        return self

    def fleet_args(self, policy: str) -> dict[str, Any]:
        """The fleet's `args` for one of the policies, as app.config.load takes them."""
        ours = {
            "model": {
                "model_id": "emulated",
                "model_source": "models/tiny-llama",
                # No two prompts of a trace share a prefix. The paper's engine kept 1% free, too.
                "engine_kwargs": {"enable_prefix_caching": False, "watermark": 0.01},
            },
            "engine": {"emulated": {"profile": self.profile}},
            "priorities": {
                name: {**one.model_dump(exclude_defaults=True), **UNBOUNDED}
                for name, one in default_priorities().items()
            },
            **self._instances(),
        }
        return merge(merge(ours, self.args), BASELINES[policy])

    def fleet_config(self, policy: str) -> FleetConfig:
        """`fleet_args`, checked. Raises ScenarioError."""
        try:
            return load(self.fleet_args(policy))
        except ConfigError as error:
            raise ScenarioError(f"{self.name}: {error}") from None

    def _instances(self) -> dict[str, Any]:
        scaled = self.args.get("autoscaling") is not None
        return {"autoscaling": {"max": self.instances}} if scaled else {"replicas": self.instances}

    def each(self) -> list["Scenario"]:
        """Its variants; itself, where it has none."""
        if not self.variants:
            return [self]
        return [
            self.changed(name=f"{self.name}@{name}", args=merge(self.args, more), variants={})
            for name, more in self.variants.items()
        ]

    def changed(self, **changes: Any) -> "Scenario":
        """The same scenario, with other values for some keys. Raises ScenarioError."""
        return _validated({**self.model_dump(), **changes}, "the command line")

    def trace_at(self, rate: float) -> list[TraceRequest]:
        """The trace at `rate` requests/s. Lengths are the same at all rates. Raises TraceError."""
        if isinstance(self.trace, FileConfig):
            return prioritized(self._file_at(self.trace, rate), self.high_priority, self.seed)
        return synthetic(
            INPUTS[self.trace.input],
            OUTPUTS[self.trace.output],
            self.requests,
            rate,
            cv=self.arrivals.cv,
            high_priority=self.high_priority,
            seed=self.seed,
        )

    def _file_at(self, source: FileConfig, rate: float) -> list[TraceRequest]:
        if len(source.requests) < self.requests:
            raise TraceError(
                f"{source.file}: has {len(source.requests)} requests, not {self.requests}"
            )
        if self.arrivals.process == "recorded":
            return at_rate(source.requests[: self.requests], rate)
        trace = picked(source.requests, self.requests, self.seed)
        return arriving(trace, rate, self.arrivals.cv, self.seed)


def load_scenario(name: str) -> Scenario:
    """The scenario of that name in load_tests/scenarios, or in a file. Raises ScenarioError."""
    file = SCENARIOS / f"{name}.yaml"
    if not file.is_file():
        file = Path(name)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in SCENARIOS.glob("*.yaml")))
        raise ScenarioError(f"{name!r} is no scenario and no file; scenarios: {known}")
    return _validated({"name": file.stem, **_mapping(file)}, file.name)


def _validated(content: Mapping[str, Any], where: str) -> Scenario:
    try:
        return Scenario.model_validate(content)
    except ValidationError as error:
        raise ScenarioError(f"{where}: {problem(error, Scenario)}") from None


def _mapping(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScenarioError(f"{file.name}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ScenarioError(f"{file.name}: must be a mapping of keys")
    return content


def _one_of(known: Iterable[str], name: str) -> str:
    if name not in known:
        raise ValueError(f"{name!r} is not known{hint(name, known)}")
    return name


def _has(args: object, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(args, Mapping) or key not in args:
            return False
        args = args[key]
    return True
