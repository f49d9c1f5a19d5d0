"""Jumps in the stream of torch's CPU generator, and `determ` noise that passes over what nobody needs."""

import pytest
import torch

from cm.sampling import mersenne
from cm.sampling.mersenne import DEGREE, NEAR, SkippingStream, advance
from cm.sampling.noise import DeterministicGenerator


def test_powers_of_x_follow_the_laws_of_powers():
    one_more = mersenne._reduced(mersenne._power(DEGREE - 1) << 1)
    assert mersenne._power(DEGREE) == one_more == sum(1 << e for e in mersenne._lower_terms())
    assert mersenne._power(2**40) == mersenne._reduced(mersenne._squared(mersenne._power(2**39)))
    assert mersenne._squared(0b1011) == 0b1000101


@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 625, 5000])
@pytest.mark.parametrize("distance", [NEAR, NEAR + 1, NEAR + 12345])
def test_a_jump_equals_the_numbers_drawn(drawn, distance):
    """From any place within a block of 624, a fresh generator's first one included."""
    jumped, walked = (torch.Generator().manual_seed(-3) for _ in range(2))
    for generator in (jumped, walked):
        torch.empty(drawn).uniform_(generator=generator)
    advance(jumped, distance)
    torch.empty(distance).uniform_(generator=walked)
    assert torch.equal(
        torch.randint(2**20, (1300,), generator=jumped), torch.randint(2**20, (1300,), generator=walked)
    )


def test_far_jumps_add_up():
    a, b = (torch.Generator().manual_seed(8) for _ in range(2))
    far = 10**13 + 7
    advance(a, 2 * far + NEAR)
    for part in (far, NEAR, far):
        advance(b, part)
    assert torch.equal(torch.randn(1000, generator=a), torch.randn(1000, generator=b))


def test_an_unknown_generator_is_walked_through(monkeypatch):
    known = SkippingStream(4)
    known.skip(NEAR + 5)
    expected = torch.randn(40, generator=known.generator)
    monkeypatch.setattr(mersenne, "_is_known", lambda: False)
    monkeypatch.setattr(mersenne, "_jump", None)
    walked = SkippingStream(4)
    walked.skip(NEAR + 5)
    assert torch.equal(torch.randn(40, generator=walked.generator), expected)


@pytest.mark.parametrize("shape", [(40,), (5, 3), (3, 16, 16)], ids=str)
@pytest.mark.parametrize("num_samples", [16, 48, 7])
def test_determ_rows_are_those_of_the_whole_draw(shape, num_samples):
    """Also when rows do not end where blocks of 16 do, when other kinds of draws lie between, and past the last row."""
    generator = DeterministicGenerator(num_samples, 9, rank=1, world_size=2)
    stream = torch.Generator().manual_seed(9)
    generator.set_done_samples(3)
    rows = [min(i, num_samples - 1) for i in (4, 6, 8)]
    for _ in range(2):
        whole = torch.randn(num_samples, *shape, generator=stream)
        assert torch.equal(generator.randn(3, *shape), whole[rows])
        whole = torch.randn(num_samples, *shape, generator=stream, dtype=torch.float64)
        assert torch.equal(generator.randn(3, *shape, dtype=torch.float64), whole[rows])
        whole = torch.randint(0, 10, (num_samples,), generator=stream)
        assert torch.equal(generator.randint(0, 10, (3,)), whole[rows])


def test_determ_draws_of_a_large_run_agree_with_the_whole_draw():
    generator, stream = DeterministicGenerator(600, 1), torch.Generator().manual_seed(1)
    generator.set_rows([500, 2, 599])
    for _ in range(3):
        whole = torch.randn(600, 3, 64, 64, generator=stream)
        assert torch.equal(generator.randn(3, 3, 64, 64), whole[[500, 2, 599]])


def test_determ_makes_no_tensor_of_the_whole_run():
    """A draw for 10^9 samples would be 48 TB."""
    generator = DeterministicGenerator(10**9, 1)
    generator.set_done_samples(10**8)
    assert generator.randn(2, 3, 64, 64).std() == pytest.approx(1, abs=0.02)
    assert generator.randn(0, 3, 64, 64).shape == (0, 3, 64, 64)
