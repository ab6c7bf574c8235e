"""The stateless random numbers: uniform, independent, and a function of their address only."""

import torch

from dream_lightning.diffusion import independent_t, stratified_t
from dream_lightning.diffusion.noise import uniform


def test_is_a_function_of_its_keys():
    everything = uniform(3, torch.arange(5)[:, None], torch.arange(7))
    assert torch.equal(everything[2, 4], uniform(3, torch.tensor(2), 4))
    assert torch.equal(everything[:, 3:], uniform(3, torch.arange(5)[:, None], torch.arange(3, 7)))
    assert not torch.equal(everything, uniform(4, torch.arange(5)[:, None], torch.arange(7)))
    assert not torch.equal(uniform(0, torch.tensor([1]), 2), uniform(0, torch.tensor([2]), 1))


def test_equals_the_same_hash_in_unbounded_integers():
    """SplitMix64's finalizer in Python's integers, modulo 2^64."""
    modulus = 2**64

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % modulus
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % modulus
        return z ^ (z >> 31)

    for seed, a, b in ((0, 0, 0), (5, -1, 2**40), (-3, 7, -(2**63))):
        state, gamma = seed % modulus, 0x9E3779B97F4A7C15
        for key in (a, b):
            state = mix((state + gamma) % modulus ^ mix((key + gamma) % modulus))
        assert uniform(seed, torch.tensor(a), b).item() == (state >> 40) * 2.0**-24


def test_uniform_and_independent():
    u = uniform(1, torch.arange(300)[:, None], torch.arange(1000)).double()  # [300, 1000]
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_square = ((counts - 3000) ** 2 / 3000).sum()
    assert chi_square < 160  # 99 degrees of freedom: mean 99, sd 14
    centered = u - 0.5
    for a, b in ((centered[:, 1:], centered[:, :-1]), (centered[1:], centered[:-1])):
        assert abs((a * b).mean() * 12) < 0.01  # correlation of neighbors; sd 0.0018


def test_stratified_t_covers_every_window():
    document_ids = torch.arange(1000)
    t = stratified_t(0, torch.zeros(1000, dtype=torch.int64), document_ids, t_min=1e-3)
    assert t.min() >= 1e-3 and t.max() <= 1
    for start in range(0, 984, 7):
        gaps = torch.diff(torch.cat([torch.zeros(1), t[start : start + 16].sort().values, torch.ones(1)]))
        assert gaps.max() < 2.1 / 16


def test_negative_epochs_share_an_offset_of_their_own():
    ids, epoch = torch.arange(9), lambda number: torch.full((9,), number)
    t = [stratified_t(0, epoch(number), ids) for number in (-2, -1, 0)]
    assert torch.equal(t[0], t[1]) and not torch.equal(t[1], t[2])


def test_t_is_uniform_over_epochs():
    """Over the epochs the t of any one sample is uniform."""
    epochs = torch.arange(4000)
    for t in (
        stratified_t(0, epochs, torch.full_like(epochs, 17), t_min=1e-3),
        independent_t(0, epochs, torch.full_like(epochs, 17), t_min=1e-3),
    ):
        counts = torch.histc(t, bins=20, min=0, max=1)
        assert ((counts - 200) ** 2 / 200).sum() < 45  # 19 degrees of freedom: mean 19, sd 6
