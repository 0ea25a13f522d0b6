"""KV blocks whose contents decide the next token, in place of a model.

A block that was lost, overwritten, copied too early or to the wrong place gives another token; so
does a token that was skipped or doubled.
"""

BLOCK = 4
VOCABULARY = 1 << 16
STOP_EVERY = 150
"""One token in so many ends its request, which nobody can foresee."""
GARBAGE = [-7] * BLOCK


def kv_of(before: int, token: int) -> int:
    """What one token leaves in the KV cache; it depends on all that came before it."""
    return hash((before, token))


def token_after(kv: list[int]) -> int:
    """The token that a model with this KV cache says next."""
    return hash(tuple(kv)) % VOCABULARY


def request_bytes(prompt: list[int], max_tokens: int) -> bytes:
    """The request as it travels in a Submission."""
    return bytes([max_tokens, *prompt])


def stream(request: bytes) -> list[int]:
    """All output tokens of a request that nobody moves: the truth."""
    max_tokens, *tokens = request
    kv: list[int] = []
    outputs: list[int] = []
    while not is_last(outputs, max_tokens):
        for token in tokens:
            kv.append(kv_of(kv[-1] if kv else 0, token))
        tokens = [token_after(kv)]
        outputs += tokens
    return outputs


def is_last(outputs: list[int], max_tokens: int) -> bool:
    """Whether the request ends with these outputs."""
    return bool(outputs) and (len(outputs) == max_tokens or outputs[-1] % STOP_EVERY == 0)


class Pool:
    """KV blocks: who uses them, what lies in them, and which are known as a prefix of what."""

    def __init__(self, blocks: int) -> None:
        self.contents = [list(GARBAGE) for _ in range(blocks)]
        self.free = list(range(blocks))
        self._users = [0] * blocks
        self._cached: dict[int, int] = {}
        self._key: dict[int, int] = {}

    def take(self) -> int:
        """The block that was freed last: what lay in it is gone."""
        block = self.free.pop()
        self._users[block] = 1
        self._wipe(block)
        return block

    def overwrite(self, blocks: list[int]) -> None:
        """Others had these meanwhile, as far as they are free."""
        for block in blocks:
            if not self._users[block]:
                self._wipe(block)

    def _wipe(self, block: int) -> None:
        self._cached.pop(self._key.pop(block, 0), None)
        self.contents[block][:] = GARBAGE

    def give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} given back twice"
            if not self._users[block]:
                self.free.append(block)

    def remember(self, tokens: list[int], blocks: list[int], computed: int) -> None:
        """These blocks hold the KV of these tokens, as far as they are full."""
        for number in range(computed // BLOCK):
            key = hash(tuple(tokens[: (number + 1) * BLOCK]))
            if key not in self._cached and blocks[number] not in self._key:
                self._cached[key] = blocks[number]
                self._key[blocks[number]] = key

    def prefix(self, tokens: list[int], most: int) -> list[int]:
        """Share the blocks that hold the first of these tokens already, at most so many."""
        found: list[int] = []
        while len(found) < most:
            key = hash(tuple(tokens[: (len(found) + 1) * BLOCK]))
            if (block := self._cached.get(key)) is None:
                break
            if not self._users[block]:
                self.free.remove(block)
            self._users[block] += 1
            found.append(block)
        return found
