"""Attention without a GPU: what of Megatron's flags it acts on."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dr.mcore.cpu.layers import Attention


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_attention_dropout_is_of_training_alone(dropout: float) -> None:
    """A share of the probabilities is dropped, and the others grow: the mean stays."""
    config = SimpleNamespace(attention_dropout=dropout, sequence_parallel=True)
    attention = Attention(config)  # type: ignore[arg-type]
    query, key = torch.randn(2, 64, 8, 4, 16)
    ones = torch.ones(64, 8, 4, 16)
    whole = attention.eval()(query, key, ones)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    trained = attention.train()(query, key, ones)
    assert torch.equal(trained, attention(query, key, ones)) == (dropout == 0)
    assert trained.mean().item() == pytest.approx(1.0, abs=0.05)
    first = trained[0]  # it sees itself alone: dropped, or as much larger
    assert set(first.mul(1 - dropout).round(decimals=4).unique().tolist()) <= {0.0, 1.0}
