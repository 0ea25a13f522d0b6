"""`python -m load_tests.profile_fit`: LLaMA-7B on an A10, from what Llumnix (OSDI'24) published.

Writes load_tests/profiles/a10-llama-7b.json and docs/profile-a10.svg, and prints how far off the
profile is at each published point. load_tests.profile_record fits what it measured the same way.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deployments.emulated.profile import PROFILES, Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = Path(__file__).parents[1] / "docs/profile-a10.svg"

TOKENS = [256, 512, 1024, 2048, 4096, 8192]
RECOMPUTE_MS = [58, 110, 220, 436, 940, 1995]
BLOCKING_COPY_MS = [68, 129, 226, 451, 909, 1682]
"""LLaMA-7B in the plots of the paper's artifact: a request of so many tokens moves, as a prefill of
its prompt and output, or as one copy of its KV cache."""

BATCH_TOKENS = 8192
BATCH_STEP_MS = (46.80 + 43.62) / 2
"""Decode step without migration, same plots: the mean of the ends of their range. The batch has
`BATCH_TOKENS` of context, in 32 sequences of 256 to one of 8k."""

BATCH_SPREAD = 2.6
"""A decode step takes up to so many times as long in a large batch as in a small one (the paper's
motivation); taken here for that batch and an almost empty one."""

A10: dict[str, Any] = {
    "blocks": 851,  # 13,616 tokens in the paper
    "block_size": 16,
    "source": "fitted by load_tests.profile_fit to the numbers published with Llumnix (OSDI'24):"
    " LLaMA-7B, FP16, one A10; 64 Gbit/s between machines",
}


@dataclass(frozen=True, slots=True)
class Step:
    """A step that took `seconds`; the rest is what `Profile.step_s` takes."""

    tokens: int
    decode_context: int
    prefill_pairs: float
    seconds: float

    @classmethod
    def prefill(cls, tokens: int, seconds: float) -> "Step":
        """A whole prompt. In chunks it takes as long, while these are larger than the knee."""
        return cls(tokens, 0, tokens**2 / 2, seconds)

    def fitted_s(self, profile: Profile) -> float:
        return profile.step_s(self.tokens, self.decode_context, self.prefill_pairs)

    def __str__(self) -> str:
        attention = f"{self.decode_context:>7,} of context, {self.prefill_pairs:>12,.0f} pairs"
        return f"step of {self.tokens:>6,} tokens, {attention}"


@dataclass(frozen=True, slots=True)
class Copy:
    """A transfer of the KV of so many tokens."""

    tokens: int
    seconds: float

    def fitted_s(self, profile: Profile) -> float:
        return profile.copy_time_s(self.tokens)

    def __str__(self) -> str:
        return f"copy of {self.tokens:>6,} tokens"


Point = Step | Copy

STEPS = [
    *(Step.prefill(n, ms / 1e3) for n, ms in zip(TOKENS, RECOMPUTE_MS, strict=True)),
    Step(1, 0, 0, BATCH_STEP_MS / BATCH_SPREAD / 1e3),
    Step(8, BATCH_TOKENS, 0, BATCH_STEP_MS / 1e3),  # any number up to the knee gives the same
]
COPIES = [Copy(n, ms / 1e3) for n, ms in zip(TOKENS, BLOCKING_COPY_MS, strict=True)]


def main() -> None:
    profile = fit(STEPS, COPIES, **A10)
    save(profile, PROFILES / "a10-llama-7b.json")
    print(table(profile, [*STEPS, *COPIES]))
    _plot(profile, PLOT)


def fit(steps: Sequence[Step], copies: Sequence[Copy], **others: Any) -> Profile:
    """The profile whose times have the least squares of relative errors. `others`: as of `Profile`.

    Which steps read the weights for longer than they compute is not known beforehand: each number
    of tokens is tried as the last one that does (the knee of the roofline).
    """
    knees = sorted({0, *(step.tokens for step in steps)})
    copying = _fit_copies(copies)
    tried = [Profile(**_fit_steps(steps, knee), **copying, **others) for knee in knees]
    return min(tried, key=lambda profile: sum(error(profile, step) ** 2 for step in steps))


def error(profile: Profile, point: Point) -> float:
    """The profile's time is by this share of the measured one too long."""
    return point.fitted_s(profile) / point.seconds - 1


def table(profile: Profile, points: Iterable[Point]) -> str:
    """One row for each point, and the numbers of the profile."""
    rows = [
        f"{point!s:<60} {1e3 * point.seconds:>9.2f} ms {1e3 * point.fitted_s(profile):>9.2f} ms"
        f" {100 * error(profile, point):>+7.1f} %"
        for point in points
    ]
    heading = f"{'':<60} {'measured':>12} {'fitted':>12} {'error':>9}"
    times = {k: v for k, v in msgspec.structs.asdict(profile).items() if k.endswith("_s")}
    return "\n".join([heading, *rows, ", ".join(f"{name} {s:g}" for name, s in times.items())])


def save(profile: Profile, file: Path) -> None:
    """As `load_profile` reads it."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")


def _fit_steps(steps: Sequence[Step], knee: int) -> dict[str, Any]:
    rows = [
        (
            float(step.tokens <= knee),
            step.tokens if step.tokens > knee else 0.0,
            step.decode_context,
            step.prefill_pairs,
        )
        for step in steps
    ]
    names = ("weights_s", "token_s", "context_s", "pair_s")
    return _least_squares(names, rows, [step.seconds for step in steps])


def _fit_copies(copies: Sequence[Copy]) -> dict[str, Any]:
    rows = [(1.0, copy.tokens) for copy in copies]
    return _least_squares(("copy_s", "copy_token_s"), rows, [copy.seconds for copy in copies])


def _least_squares(
    names: Sequence[str], rows: Sequence[Sequence[float]], seconds: Sequence[float]
) -> dict[str, float]:
    """Factors of the columns, none negative, for the least squares of relative errors; four digits.

    Over the columns whose factor is not 0 they are the plain least squares: so they are the best
    among those of all subsets of columns that come out without a negative one.
    """
    matrix = np.array(rows) / np.array(seconds)[:, np.newaxis]
    found = [np.zeros(len(names))]
    for kept in _subsets(range(len(names))):
        factors = np.zeros(len(names))
        factors[kept] = np.linalg.lstsq(matrix[:, kept], np.ones(len(rows)))[0]
        if (factors >= 0).all():
            found.append(factors)
    best = min(found, key=lambda factors: float(np.linalg.norm(matrix @ factors - 1)))
    return {name: float(f"{factor:.4g}") for name, factor in zip(names, best, strict=True)}


def _subsets(columns: Sequence[int]) -> Iterable[list[int]]:
    sizes = range(1, len(columns) + 1)
    return (list(s) for n in sizes for s in itertools.combinations(columns, n))


def _plot(profile: Profile, file: Path) -> None:
    import matplotlib  # here, because who records a profile may not have it

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = file.name  # the same profile makes the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    _plot_whole_requests(left, profile)
    _plot_decode(right, profile)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _plot_whole_requests(axes: "Axes", profile: Profile) -> None:
    tokens = [int(n) for n in np.geomspace(TOKENS[0], TOKENS[-1], 60)]
    prefills = [Step.prefill(n, 0).fitted_s(profile) for n in tokens]
    copies = [profile.copy_time_s(n) for n in tokens]
    for colour, label, published_ms, fitted_s in (
        ("C4", "recompute", RECOMPUTE_MS, prefills),
        ("C1", "blocking copy", BLOCKING_COPY_MS, copies),
    ):
        axes.plot(TOKENS, published_ms, f"{colour}o", label=f"{label}, published")
        axes.plot(tokens, [1e3 * s for s in fitted_s], f"{colour}-", label=f"{label}, profile")
    axes.set(xscale="log", yscale="log", xlabel="tokens of the request", ylabel="ms")
    axes.set_xticks(TOKENS, ["256", "512", "1k", "2k", "4k", "8k"], minor=False)
    axes.minorticks_off()


def _plot_decode(axes: "Axes", profile: Profile) -> None:
    contexts = [0, BATCH_TOKENS]
    published_ms = [BATCH_STEP_MS / BATCH_SPREAD, BATCH_STEP_MS]
    fitted_ms = [1e3 * profile.step_s(1, context, 0) for context in contexts]
    axes.plot(contexts, published_ms, "C0o", label="decode step, published")
    axes.plot(contexts, fitted_ms, "C0-", label="decode step, profile")
    axes.set(xlabel="tokens of context in the batch", ylabel="ms", ylim=(0, None))


if __name__ == "__main__":
    main()
