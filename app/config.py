"""The `args` of the application in a Serve YAML file: every key, its meaning and its default.

    config = load(args)  # a ConfigError is one line that names the wrong key

Nothing here imports vLLM or Ray.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from app import engine_args
from app.resources import resources
from app.validation import ConfigError, hint, problem, show
from deployments.emulated.profile import is_known_profile, load_profile

PROJECT = Path(__file__).parents[1]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)

NonEmpty = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Strict: a wrong key, or a string where a number belongs, is an error, never a guess."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which model the engines serve, and how vLLM runs it."""

    model_id: NonEmpty = Field(description="the name clients send as `model`")
    model_source: NonEmpty = Field(
        description="a folder, relative ones from the current one or the project's; or a hub id"
    )
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of vLLM's engine and OpenAI server, in Python"
    )
    accelerator_type: NonEmpty | None = Field(
        default=None, description="the GPU that Ray must place a replica on, such as A10G"
    )

    @field_validator("model_source")
    @classmethod
    def _resolve(cls, source: str) -> str:
        # Absolute, because replicas run in whatever folder Ray was started in.
        folder = local_folder(source)
        return source if folder is None else str(folder)


class EmulatedEngine(Section):
    """vLLM's scheduler and KV blocks, and an accelerator that only takes its time."""

    profile: NonEmpty = Field(
        description="a profile in load_tests/profiles by name, or a file: how long steps take"
    )

    @field_validator("profile")
    @classmethod
    def _resolve(cls, name: str) -> str:
        # Files by their absolute path, because replicas run in whatever folder Ray was started in.
        load_profile(name)
        return name if is_known_profile(name) else str(Path(name).absolute())


class EngineConfig(Section):
    """What runs the model; `engine: vllm` is short for nothing set here."""

    emulated: EmulatedEngine | None = Field(
        default=None, description="no accelerator and no weights: tokens mean nothing"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value != "vllm":
                raise ValueError(f"{value!r} is not known; it is vllm, or {{emulated: ...}}")
            return {}
        return value


class AutoscalingConfig(Section):
    """How many instances there are, by the fleet's mean freeness."""

    min: int = Field(default=1, ge=1, description="fewest instances")
    max: int = Field(ge=1, description="most instances")
    initial: int | None = Field(
        default=None,
        ge=1,
        description="instances after each deployment of a changed fleet; by default as many as"
        " there are, and min at first",
    )
    freeness_low: float = Field(
        default=10, ge=0, description="with less freeness on average, instances are added"
    )
    freeness_high: float = Field(
        default=60, ge=0, description="with more, one after the other is emptied and stopped"
    )
    period_s: float = Field(
        default=10.0, gt=0, description="demand is averaged over this time before each decision"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, fewer than min, which is {self.min}")
        if self.initial is not None and not self.min <= self.initial <= self.max:
            raise ValueError(f"initial is {self.initial}, not from {self.min} to {self.max}")
        if self.freeness_high <= self.freeness_low:
            raise ValueError("freeness_high must be more than freeness_low")
        return self


class MigrationConfig(Section):
    """When running requests move between instances, and by which transport."""

    enabled: bool = Field(default=True, description="move requests from loaded to free instances")
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="transport of KV blocks; auto: nccl on GPUs, else gloo"
    )
    out_threshold: float = Field(
        default=3, description="an instance with less freeness hands requests over"
    )
    in_threshold: float = Field(
        default=3, ge=1, description="an instance with more freeness may take requests"
    )
    min_gain: float = Field(
        default=1.0, ge=0, description="freeness that a move must win, or it is not made"
    )
    max_concurrent: int = Field(
        default=4, ge=1, description="moves at once for each instance and direction"
    )
    max_stages: int = Field(
        default=8,
        ge=0,
        description="copies that a move may make; the last one suspends the request. 1: a blocking"
        " copy; 0: no copy, the destination computes the KV again",
    )
    timeout_s: float = Field(
        default=10.0, gt=0, description="longest wait of a move; then it is given up"
    )


class PriorityClass(Section):
    """What a named class of requests gets; header `x-llumnix-priority` names it."""

    priority: int = Field(default=0, description="vLLM's priority: lower is scheduled earlier")
    headroom_tokens: int = Field(
        default=0,
        ge=0,
        description="KV tokens kept free on an instance that runs such requests, as long as"
        " another one has any left",
    )
    api_keys: list[NonEmpty] = Field(
        default=[],
        repr=False,
        description="bearer tokens whose requests may use the class, and get it by default; none:"
        " everybody may",
    )
    max_queued_tokens: int | None = Field(
        default=2_000_000,
        ge=1,
        description="prompt tokens of its requests that may wait for their first token, at each"
        " ingress; more are refused with 429. null: no bound",
    )
    max_queue_s: float | None = Field(
        default=60.0,
        gt=0,
        description="its requests are refused while one waits for its first token longer than this,"
        " or is about to, at each ingress. null: no bound",
    )


class RecoveryConfig(Section):
    """What becomes of the requests of an instance that dies or hangs."""

    max_recoveries: int = Field(
        default=3,
        ge=0,
        description="losses of its instance that a request survives; 0: none is continued",
    )
    hang_s: float = Field(
        default=5.0,
        ge=2,  # it is asked after one second
        description="an instance that has work and says nothing for so long hangs: its requests go"
        " on elsewhere. More than the longest step takes",
    )
    wait_s: float = Field(
        default=60.0,
        gt=0,
        description="longest wait for an instance that takes a lost request over",
    )
    max_journal_tokens: int = Field(
        default=50_000_000,
        ge=0,
        description="tokens of prompts and outputs that each ingress keeps to continue requests;"
        " one that does not fit is lost with its instance",
    )


class AdminConfig(Section):
    """The admin API under `/fleet`."""

    enabled: bool = Field(default=True, description="serve it; its routes answer 404 otherwise")
    api_key: NonEmpty | None = Field(
        default=None,
        repr=False,
        description="the bearer token it asks for; by default VLLM_API_KEY, if set",
    )


def default_priorities() -> dict[str, PriorityClass]:
    """The classes that there are where the YAML names none."""
    return {
        "high": PriorityClass(priority=-10, headroom_tokens=1600),
        "normal": PriorityClass(),
    }


class FleetConfig(Section):
    """All that can be set in `args`."""

    model: ModelConfig = Field(description="the model and its engine arguments")
    engine: EngineConfig = Field(
        default_factory=EngineConfig,
        description="what runs the model: vllm, or {emulated: {profile: NAME}}",
    )
    replicas: int = Field(default=2, ge=1, description="instances, each with an engine")
    autoscaling: AutoscalingConfig | None = Field(
        default=None, description="as many instances as are needed, instead of `replicas`"
    )
    dispatch: Literal["freeness", "queue", "power_of_two", "round_robin"] = Field(
        default="freeness", description="how the instance for a new request is chosen"
    )
    migration: MigrationConfig = Field(
        default_factory=MigrationConfig, description="rescheduling of running requests"
    )
    priorities: dict[NonEmpty, PriorityClass] = Field(
        default_factory=default_priorities,
        description="classes of requests by name; `normal` is that of requests that name none",
    )
    recovery: RecoveryConfig = Field(
        default_factory=RecoveryConfig, description="requests whose instance is lost"
    )
    admin: AdminConfig = Field(default_factory=AdminConfig, description="the admin API")

    @model_validator(mode="after")
    def _one_number_of_instances(self) -> Self:
        if self.autoscaling and "replicas" in self.model_fields_set:
            raise ValueError("replicas and autoscaling are both given; keep one of them")
        return self

    @property
    def headroom_tokens(self) -> dict[str, int]:
        """Of each class of requests."""
        return {name: one.headroom_tokens for name, one in self.priorities.items()}

    @property
    def first_replicas(self) -> int:
        """Instances that a new fleet begins with."""
        scaled = self.autoscaling
        return self.replicas if scaled is None else scaled.initial or scaled.min

    @field_validator("priorities")
    @classmethod
    def _has_normal(cls, classes: dict[str, PriorityClass]) -> dict[str, PriorityClass]:
        if "normal" not in classes:
            raise ValueError("the class 'normal' is missing: requests that name no class get it")
        if classes["normal"].api_keys:
            raise ValueError("the class 'normal' can have no api_keys: it is open to everybody")
        return classes


def load(args: Mapping[str, Any]) -> FleetConfig:
    """The configuration in an application's `args`. Raises ConfigError."""
    try:
        config = FleetConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError(problem(error, FleetConfig, "args")) from None
    _check_engine_kwargs(config.model.engine_kwargs)
    resources(config)  # says whether it can run here at all
    return config


def local_folder(source: str) -> Path | None:
    """The absolute folder that a `model_source` means, there or not; None for a hub id or URL."""
    if "://" in source:
        return None
    path = Path(source).expanduser()
    for base in (Path.cwd(), PROJECT):
        if (base / path).is_dir():
            return (base / path).resolve()
    # models/nope is a folder misspelt where models/ exists, not an organisation on a hub.
    in_a_folder_here = len(path.parts) > 1 and any(
        (base / path.parts[0]).is_dir() for base in (Path.cwd(), PROJECT)
    )
    looks_local = source.startswith((".", "~")) or not HUB_ID.fullmatch(source)
    return path.absolute() if looks_local or in_a_folder_here else None


def _check_engine_kwargs(kwargs: Mapping[str, Any]) -> None:
    for key, value in kwargs.items():
        path = f"model.engine_kwargs.{key}"
        if key in engine_args.RESERVED:
            raise ConfigError(f"{path}: cannot be set here, {engine_args.RESERVED[key]}")
        known = engine_args.annotations()
        if key not in known:
            raise ConfigError(f"{path}: vLLM has no such engine argument{hint(key, known)}")
        if not engine_args.accepts(key, value):
            raise ConfigError(f"{path}: must be {engine_args.meaning(key)}, not {show(value)}")
