"""Keyed randomness: the same name gives the same value, whatever else is drawn, and other names other values."""

import numpy as np
import pytest

from diffusion import rng


def test_a_draw_depends_on_its_name_alone():
    whole = rng.normal(7, "noise", np.arange(256), 3, shape=(4, 5))
    assert whole.shape == (256, 4, 5)
    assert whole.dtype == np.float32
    for sample in (0, 17, 255):
        assert np.array_equal(whole[sample], rng.normal(7, "noise", sample, 3, shape=(4, 5)))
    assert np.array_equal(whole[[200, 3]], rng.normal(7, "noise", [200, 3], 3, shape=(4, 5)))


@pytest.mark.parametrize(
    "other", [(8, "noise", 1, 2, 3), (7, "time", 1, 2, 3), (7, "noise", 2, 2, 3), (7, "noise", 1, 2, 4)]
)
def test_other_names_give_other_values(other):
    assert not np.array_equal(rng.bits(7, "noise", 1, 2, 3, size=4), rng.bits(*other, size=4))


def test_swapped_ids_are_other_names():
    assert not np.array_equal(rng.bits(0, "x", 1, 2, size=2), rng.bits(0, "x", 2, 1, size=2))


def test_known_values_never_change():
    """A release that moves these would silently change every run that is resumed under it."""
    assert rng.bits(0, "x", 1, 2, 3, size=2).tolist() == [7399463175241587158, 6613272982659666618]
    assert rng.permutation(0, "order", 1, 10).tolist() == [1, 0, 2, 7, 3, 9, 6, 4, 8, 5]
    assert rng.uniform(0, "t", 4, size=1)[0] == pytest.approx(0.94860949, abs=1e-8)


def test_uniform_and_normal_have_their_moments():
    u = rng.uniform(0, "u", np.arange(200), size=500)
    assert u.min() > 0
    assert u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=0.003)
    assert u.var() == pytest.approx(1 / 12, rel=0.02)
    z = rng.normal(0, "z", np.arange(200), shape=(501,))
    assert z.mean() == pytest.approx(0, abs=0.01)
    assert z.std() == pytest.approx(1, abs=0.01)
    assert (z**4).mean() == pytest.approx(3, abs=0.1)


def test_samples_are_uncorrelated():
    z = rng.normal(0, "z", np.arange(2), shape=(40_000,))
    assert abs(np.corrcoef(z)[0, 1]) < 0.02
    assert abs(np.corrcoef(z[0, ::2], z[0, 1::2])[0, 1]) < 0.02


def test_a_file_name_is_its_id():
    assert rng.name_id("a.png") == rng.name_id("a.png")
    assert len({rng.name_id(f"{n}.png") for n in range(10_000)}) == 10_000
    assert 0 <= rng.name_id("é") < 2**63
