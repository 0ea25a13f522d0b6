"""Seeded prompts of mixed length."""

import random
import string


def random_prompt(rng: random.Random, shortest: int, longest: int) -> str:
    """Words of random letters; as many characters as drawn, so as many tokens of the tiny model."""
    length = rng.randint(shortest, longest)
    letters = rng.choices(string.ascii_lowercase + " " * 4, k=length)
    return "".join(letters)
