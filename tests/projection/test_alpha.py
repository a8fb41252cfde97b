"""alpha where it looks at no gradient."""

import pytest

from megatron_dr.projection import alpha_at, safest_alpha


def test_schedules() -> None:
    assert [alpha_at("constant", 0.3, 0.9, step, 10) for step in (0, 5, 99)] == [0.3] * 3
    for style in ("linear", "cosine"):
        at = [alpha_at(style, 0.8, 0.2, step, 10) for step in (0, 5, 10, 11, 1000)]
        assert at == pytest.approx([0.8, 0.5, 0.2, 0.2, 0.2], abs=1e-15)
        falling = [alpha_at(style, 0.8, 0.2, step, 10) for step in range(11)]
        assert falling == sorted(falling, reverse=True)
    assert alpha_at("linear", 0.0, 1.0, 1, 4) == 0.25
    assert alpha_at("cosine", 0.0, 1.0, 1, 3) == pytest.approx(0.25)


def test_bad_schedules() -> None:
    with pytest.raises(ValueError, match="alpha style is 'step'"):
        alpha_at("step", 0.0, 1.0, 0, 1)
    with pytest.raises(ValueError, match="steps is 0"):
        alpha_at("linear", 0.0, 1.0, 0, 0)


def test_the_safest_constant_bounds_the_passes_of_the_target() -> None:
    assert [safest_alpha(passes) for passes in (0.0, 1.0, 3.0, 6.0, 1500.0)] == [
        0.5, 0.5, 0.5, 0.25, 0.001,
    ]  # fmt: skip
