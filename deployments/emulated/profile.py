"""How long an accelerator takes, and how much it holds: the numbers behind an emulated engine."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

PROFILES = Path(__file__).parents[2] / "load_tests/profiles"


class ProfileError(ValueError):
    """One line that says what is wrong with a profile file."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latency model and capacity of one model on one accelerator. All times in seconds.

    A step reads all weights once, or computes its tokens if that takes longer (the roofline); on
    top of it, decoding reads the KV of its context, and a prefill attends to what came before it.
    """

    weights_s: float
    """The shortest step."""
    token_s: float
    """Computing a token, once there are enough of them to take longer than `weights_s`."""
    context_s: float
    """Reading the KV of one token of context, for a request that decodes."""
    pair_s: float
    """Attention of one prompt token to one before it."""
    copy_s: float
    """Setting up a transfer of KV blocks."""
    copy_token_s: float
    """Moving the KV of one token to another instance."""
    blocks: int
    """KV blocks that requests can hold."""
    block_size: int
    """Tokens of a KV block."""
    max_batch: int = 256
    """Requests that run at once (vLLM's max_num_seqs)."""
    max_step_tokens: int = 2048
    """Tokens that a step computes at most (vLLM's max_num_batched_tokens)."""
    source: str = ""
    """Where the numbers come from."""

    def step_s(self, tokens: int, decode_context: int, prefill_pairs: float) -> float:
        """Seconds of a step that computes so many tokens; 0 where it has none.

        `decode_context`: tokens of KV that decoding requests attend to, in sum. `prefill_pairs`:
        pairs of a prompt token of this step and one before it.
        """
        if not tokens:
            return 0.0
        attention = self.context_s * decode_context + self.pair_s * prefill_pairs
        return max(self.weights_s, self.token_s * tokens) + attention

    def copy_time_s(self, tokens: int) -> float:
        """Seconds that the KV of so many tokens is on its way."""
        return self.copy_s + self.copy_token_s * tokens


def work(spans: Iterable[tuple[int, int]]) -> tuple[int, int, float]:
    """What `Profile.step_s` takes, of a step that computes for each request (start, count) tokens:
    so many from that position on.
    """
    tokens, context, pairs = 0, 0, 0.0
    for start, count in spans:
        tokens += count
        if count == 1:
            context += start
        else:
            pairs += count * (start + count / 2)
    return tokens, context, pairs


def is_known_profile(name: str) -> bool:
    """Whether load_tests/profiles has one of that name."""
    return (PROFILES / f"{name}.json").is_file()


def load_profile(name: str) -> Profile:
    """The profile of that name in load_tests/profiles, or in a file. Raises ProfileError."""
    file = PROFILES / f"{name}.json" if is_known_profile(name) else Path(name)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in PROFILES.glob("*.json")))
        raise ProfileError(f"{name!r} is no profile and no file; profiles: {known}")
    try:
        profile = msgspec.json.decode(file.read_bytes(), type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{file.name}: {error}") from None
    if problem := _problem(profile):
        raise ProfileError(f"{file.name}: {problem}")
    return profile


def _problem(profile: Profile) -> str | None:
    """Why no engine could run with it."""
    for name in ("weights_s", "token_s", "context_s", "pair_s", "copy_s", "copy_token_s"):
        if not getattr(profile, name) >= 0:
            return f"{name} must be 0 or more"
    for name in ("weights_s", "blocks", "block_size", "max_batch"):
        if not getattr(profile, name) > 0:
            return f"{name} must be more than 0"
    if profile.max_step_tokens < profile.max_batch:
        return "max_step_tokens must be at least max_batch: one for each request that decodes"
    return None
