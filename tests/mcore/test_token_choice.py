"""A token from logits and a draw: its share, ties, ends of the range, rounding."""

import pytest
import torch

from megatron_dr.mcore.rollouts.token_choice import choose, uniform


def random_logits(rows: int, size: int = 50) -> torch.Tensor:
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_p", [1.0, 0.6, 1e-9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_even_draws_give_each_token_its_share(temperature: float, top_p: float) -> None:
    """N draws (n + 1/2) / N give token k within 1 of N p_k times."""
    count, logits = 4000, random_logits(1)
    draws = (torch.arange(count) + 0.5).double() / count
    tokens = choose(logits.expand(count, -1), draws, temperature, top_p)
    p = (logits[0].double() / temperature).softmax(0)
    ranked = p.argsort(descending=True)
    size = int((p[ranked].cumsum(0) < top_p - 1e-12).sum()) + 1
    kept = torch.zeros_like(p)
    kept[ranked[:size]] = p[ranked[:size]]
    expected = count * kept / kept.sum()
    assert (torch.bincount(tokens, minlength=50) - expected).abs().max() <= 1


@pytest.mark.parametrize("top_k", [1, 7, 50, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_top_k_leaves_the_likeliest_and_top_p_counts_among_them(top_k: int, top_p: float) -> None:
    count, logits = 4000, random_logits(1)
    draws = (torch.arange(count) + 0.5).double() / count
    tokens = choose(logits.expand(count, -1), draws, 1.5, top_p, top_k)
    p = (logits[0].double() / 1.5).softmax(0)
    ranked = p.argsort(descending=True)[:top_k]
    share = p[ranked] / p[ranked].sum()
    ranked = ranked[: int((share.cumsum(0) < top_p - 1e-12).sum()) + 1]
    kept = torch.zeros_like(p)
    kept[ranked] = p[ranked]
    expected = count * kept / kept.sum()
    assert (torch.bincount(tokens, minlength=50) - expected).abs().max() <= 1


def test_equal_tokens_are_all_among_the_likeliest() -> None:
    """Rounding does not decide which of three equal tokens is the second of top-k 2."""
    logits = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0]) + 1e-6 * random_logits(1000, 5)
    draws = (torch.arange(1000) + 0.5).double() / 1000
    found = torch.bincount(choose(logits, draws, 1.0, 1.0, 2), minlength=5)
    assert found[4] == 0 and (found[1:4] - found[1]).abs().max() <= 2 and found[1] > 100


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = random_logits(64)
    logits[:, 9] = logits[:, 20] = logits.max() + 1
    noise = 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    draws = torch.zeros(64, dtype=torch.float64)
    assert choose(logits + noise, draws, 0.0, 1.0).eq(9).all()


def test_equal_tokens_are_all_in_the_nucleus() -> None:
    """Rounding does not decide which of four equal tokens top-p 0.5 keeps."""
    logits = torch.zeros(1000, 4) + 1e-6 * random_logits(1000, 4)
    draws = (torch.arange(1000) + 0.5).double() / 1000
    tokens = choose(logits, draws, 1.0, 0.5)
    assert torch.bincount(tokens, minlength=4).sub(250).abs().max() <= 2


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_extreme_draws_give_possible_tokens(draw: float) -> None:
    logits = random_logits(64)
    logits[:, 0] = logits[:, -1] = -torch.inf
    tokens = choose(logits, torch.full((64,), draw, dtype=torch.float64), 1.0, 1.0)
    assert logits.gather(1, tokens[:, None]).isfinite().all()


def test_rounding_seldom_changes_a_token() -> None:
    """Logits that differ by 1e-6 give at most one other token in 50,000."""
    logits = random_logits(50_000)
    noise = 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    draws = torch.rand(len(logits), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for top_p in (1.0, 0.8):
        one, other = (choose(x, draws, 1.0, top_p) for x in (logits, logits + noise))
        assert (one != other).sum() <= 1


def test_draws_are_even_and_differ_in_every_key() -> None:
    keys = [(s, n, t) for s in (0, 1, 2**64 - 1) for n in range(20) for t in range(20)]
    draws = torch.tensor([uniform(*key) for key in keys], dtype=torch.float64)
    assert len(set(draws.tolist())) == len(keys)
    even = (torch.arange(len(keys)) + 0.5) / len(keys)
    assert (draws.sort().values - even).abs().max() < 1.63 / len(keys) ** 0.5  # Kolmogorov, 1 %
    assert uniform(*keys[7]) == draws[7]
