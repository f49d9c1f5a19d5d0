"""Jumping ahead in the stream of torch's CPU generator, MT19937, at a cost that hardly grows with the distance.

Its state is a window of 624 words w_k ... w_{k+623} of a sequence that is linear over GF(2). So x^n mod p, where p is
the characteristic polynomial, gives w_{n+j} as the sum of those w_{i+j} whose power x^i it holds (Haramoto et al.,
2008). Polynomials are Python integers: bit i is the coefficient of x^i.
"""

import functools

import numpy as np
import torch

WORDS, MIDDLE, DEGREE = 624, 397, 19937
TWIST = 0x9908B0DF
UPPER, LOWER = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
# Below this many numbers it is faster to draw them.
NEAR = 1 << 22


class SkippingStream:
    """torch's CPU generator of a seed; numbers that nobody needs are passed over when the next ones are drawn."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._pending = 0

    def skip(self, count: int) -> None:
        """Pass over `count` numbers of 32 bits."""
        self._pending += count

    @property
    def generator(self) -> torch.Generator:
        """The generator, with all that was skipped behind it."""
        advance(self._generator, self._pending)
        self._pending = 0
        return self._generator


def advance(generator: torch.Generator, count: int) -> None:
    """Move torch's CPU generator by `count` of its 32-bit numbers."""
    if count >= NEAR and _is_known():
        _jump(generator, count)
        return
    while count > 0:
        step = min(count, NEAR)
        torch.empty(step).uniform_(generator=generator)  # one number each
        count -= step


def _jump(generator: torch.Generator, count: int) -> None:
    state = generator.get_state()
    fields = state.numpy()[: _LAYOUT.itemsize].view(_LAYOUT)[0]
    used = WORDS if fields["left"] == 1 else int(fields["next"])
    fields["words"] = _later(fields["words"].astype(np.uint32), count - (WORDS - used))
    fields["left"], fields["next"] = 1, 0  # all 624 words are used
    generator.set_state(state)


# How torch writes a state: what follows belongs to other distributions.
_LAYOUT = np.dtype(
    [("seed", "<u8"), ("left", "<i4"), ("seeded", "<i4"), ("next", "<u8"), ("words", "<u8", WORDS)]
)


@functools.cache
def _is_known() -> bool:
    """Whether this torch's generator is the one we know, by NumPy's; another one is walked through."""
    data = torch.Generator().manual_seed(1).get_state().numpy()
    if len(data) < _LAYOUT.itemsize:
        return False
    fields = data[: _LAYOUT.itemsize].view(_LAYOUT)[0]
    return fields["left"] == 1 and np.array_equal(fields["words"], np.random.RandomState(1).get_state()[1])


def _later(words: np.ndarray, distance: int) -> np.ndarray:
    """The window of the sequence `distance` words later. (624,) uint32 -> (624,) uint32."""
    bits = np.frombuffer(_power(distance).to_bytes(DEGREE // 8 + 1, "little"), np.uint8)
    terms = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
    windows = np.lib.stride_tricks.sliding_window_view(_sequence(words, DEGREE + WORDS), WORDS)
    return np.bitwise_xor.reduce(windows[terms], axis=0)


def _sequence(words: np.ndarray, length: int) -> np.ndarray:
    """The first `length` words of the sequence whose first 624 are given: w_k = w_{k-227} + A(w_{k-624}, w_{k-623})."""
    out = np.empty(length, np.uint32)
    out[:WORDS] = words
    block = WORDS - MIDDLE
    for start in range(WORDS, length, block):
        stop = min(start + block, length)
        old = out[start - WORDS : stop - WORDS]
        mixed = (old & UPPER) | (out[start - WORDS + 1 : stop - WORDS + 1] & LOWER)
        twist = np.where(mixed & 1, np.uint32(TWIST), np.uint32(0))
        out[start:stop] = out[start - block : stop - block] ^ (mixed >> 1) ^ twist
    return out


@functools.lru_cache(maxsize=64)
def _power(n: int) -> int:
    """x^n mod p."""
    lead = max(n.bit_length() - 14, 0)  # powers below x^16384 need no reduction
    value = 1 << (n >> lead)
    for k in reversed(range(lead)):
        value = _reduced(_squared(value) << (n >> k & 1))
    return value


def _squared(value: int) -> int:
    """Square over GF(2): a zero between any two bits."""
    data = np.frombuffer(value.to_bytes(value.bit_length() // 8 + 1, "little"), np.uint8)
    bits = np.zeros(16 * len(data), np.uint8)
    bits[::2] = np.unpackbits(data, bitorder="little")
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def _reduced(value: int) -> int:
    """Remainder mod p: x^DEGREE is the sum of the lower terms of p."""
    while high := value >> DEGREE:
        value ^= high << DEGREE
        for term in _lower_terms():
            value ^= high << term
    return value


@functools.cache
def _lower_terms() -> tuple[int, ...]:
    """Exponents of p but the leading one (Matsumoto and Nishimura 1998, appendix A, for w = 32, r = 31)."""
    total = 1  # Q^31 + a_0 Q^30 + ... + a_30, where Q = x^623 + x^396
    for k in range(31):
        total = (total << WORDS - 1) ^ (total << MIDDLE - 1) ^ (TWIST >> k & 1)
    total = (total << WORDS) ^ (total << MIDDLE) ^ (TWIST >> 31)
    return tuple(e for e in range(DEGREE) if total >> e & 1)
