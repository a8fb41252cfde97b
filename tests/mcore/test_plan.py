"""The plan's bytes and memory are those of real runs; `benchmarks/plan.py` shows more layouts."""

import pytest

from megatron_dr import DRConfig
from megatron_dr.mcore.buffer_rows import exact_gram, exchange
from megatron_dr.plan import memory

from . import _counted
from ._counted import Case
from ._data import Layout

BF16 = dict(bf16=True, distributed_optimizer=True)
CASES: dict[str, Case] = {
    "dp2, overlap, in pieces": Case(
        Layout(dp=2, overlap=True, **BF16), DRConfig(rows="rank", gram="exact"), piece=1000),
    "pp2, tied, sketches": Case(
        Layout(pp=2, tied=True), DRConfig(slots=2, gram="sketch", sketch_size=64)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_memory(name: str) -> None:
    """Within 1%; what is below it are scalars."""
    ((_, figures),) = _counted.measured({name: CASES[name]})
    for what, (found, said) in figures.items():
        assert found == pytest.approx(said, rel=0.01, abs=400), what


def test_pieces_are_the_exchange_s() -> None:
    assert (memory.CHUNK, memory.BUCKET) == (exchange._CHUNK, exchange._BUCKET)
    assert exact_gram._PRODUCT["cuda"] == memory.PRODUCT
