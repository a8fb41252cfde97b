"""Where a shard's elements lie in the whole parameter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dr.mcore.ownership import OwnedParameter


@st.composite
def owned(draw: st.DrawFn) -> OwnedParameter:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    dim, stride = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3))
    shape[dim] *= stride
    shards = draw(st.integers(1, 5))
    shard, parameter = draw(st.integers(0, shards - 1)), torch.nn.Parameter(torch.empty(shape))
    return OwnedParameter(parameter, "w", 0, 1.0, "", dim, stride, shard, shards)


def by_coordinates(o: OwnedParameter, start: int, stop: int) -> torch.Tensor:
    """Each element's place (outer, along, within), and that in the whole parameter."""
    flat, shape = torch.arange(start, stop), o.parameter.shape
    length, inner = shape[o.dim], math.prod(shape[o.dim + 1 :])
    outer, along, within = flat // (length * inner), flat // inner % length, flat % inner
    part = length // o.stride
    along = (along // part) * (part * o.shards) + o.shard * part + along % part
    return (outer * (length * o.shards) + along) * inner + within


@settings(max_examples=500, deadline=None)
@given(owned(), st.data())
def test_index_of_a_span(o: OwnedParameter, data: st.DataObject) -> None:
    """Spans that begin and end anywhere: in a run, at its bounds, over many, and empty ones."""
    start = data.draw(st.integers(0, o.parameter.numel()))
    stop = data.draw(st.integers(start, o.parameter.numel()))
    found = o.global_index(start, stop)
    assert found.dtype == torch.int64
    assert torch.equal(found, by_coordinates(o, start, stop))


@settings(max_examples=100, deadline=None)
@given(owned())
def test_index_is_of_megatrons_shard(o: OwnedParameter) -> None:
    """Each of `stride` stacked matrices is cut into `shards` chunks along `dim`."""
    whole = list(o.parameter.shape)
    whole[o.dim] *= o.shards
    index = torch.arange(o.global_numel).view(whole)
    chunks = [m.chunk(o.shards, o.dim)[o.shard] for m in index.chunk(o.stride, o.dim)]
    expected = torch.cat(chunks, o.dim)
    assert torch.equal(o.global_index(0, o.parameter.numel()).view(expected.shape), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_span_of_a_large_parameter(dim: int) -> None:
    """2^34 elements in the whole: beyond 32 bits, and a span's index takes no room for a run's."""
    parameter = torch.nn.Parameter(torch.empty(1).expand(2**17, 2**15))  # of one number
    o = OwnedParameter(parameter, "w", 0, 1.0, "", dim, 1, 3, 4)
    for start in (0, 2**31 - 5, 2**32 - 20):
        found = o.global_index(start, start + 20)
        assert torch.equal(found, by_coordinates(o, start, start + 20))
