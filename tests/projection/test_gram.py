"""Products of long rows equal those in float64, in however many matrices the rows lie."""

import pytest
import torch

from megatron_dr.projection import gram_of, gram_of_long


@pytest.mark.parametrize("rows", [(5,), (4, 1), (1, 3), (2, 1, 2)])
@pytest.mark.parametrize("columns", [0, 300, 512, 3000])
def test_rows_in_parts(rows: tuple[int, ...], columns: int) -> None:
    torch.manual_seed(0)
    # as in a gradient buffer: columns of a longer matrix
    parts = [torch.randn(count, columns + 7)[:, 3 : 3 + columns] for count in rows]
    expected = gram_of(torch.cat(parts)[None])[0]
    found = gram_of_long(parts)
    scale = max(1.0, float(expected.diagonal().max()))
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max()) < 1e-6 * scale


def test_what_is_not_finite_is_seen_in_every_part() -> None:
    for bad in range(3):
        parts = [torch.ones(2, 600), torch.ones(1, 600)]
        parts[bad // 2][bad % 2, 599] = float("nan")
        diagonal = gram_of_long(parts).diagonal()
        assert [bool(x) for x in diagonal.isnan()] == [number == bad for number in range(3)]
