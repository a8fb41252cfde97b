"""Runs that are ended anywhere and resumed are, to the last bit, the run that was left alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import recipes
from .cycle import Soak, can_mount, drawn
from .recipes import RECIPES
from .traps import Trap

CYCLES = 221  # of the soak


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    folder = tmp_path_factory.mktemp("kills")
    recipes.write_data(folder)
    yield Soak(folder)


NAMES = list(RECIPES)


@pytest.mark.soak
@pytest.mark.parametrize(
    "seed, name",
    [
        pytest.param(seed, NAMES[seed % len(NAMES)], id=f"{NAMES[seed % len(NAMES)]}-{seed}")
        for seed in sorted(range(CYCLES), key=lambda seed: (seed % len(NAMES), seed))
    ],
)
def test_a_cycle(soak: Soak, seed: int, name: str, tmp_path: Path) -> None:
    """Each with its own moments, ranks and ends; every tenth with Megatron's own process."""
    world = RECIPES[name].world
    traps = drawn(seed, soak.alone(name), world, can_mount(tmp_path))
    print(seed, name, *traps)
    soak.cycle(name, traps, own_writer=seed % 10 == 9)


TRACKER = "latest_checkpointed_iteration.txt"
# where a run that was resumed wrongly, or left processes, did so
MOMENTS = {
    # the file that names the last checkpoint is open, and empty; a process of Megatron's is alone
    "tracker": ("dense", Trap("kill", 0, "save", 2, TRACKER), True),
    "exchange": ("dp2 overlapped", Trap("kill", 1, "exchange", 250), False),
    "disk": ("dense", Trap("full disk", 0, "save", 40), False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_moment(soak: Soak, moment: str, tmp_path: Path) -> None:
    name, trap, own_writer = MOMENTS[moment]
    if trap.end == "full disk" and not can_mount(tmp_path):
        pytest.skip("no small disk can be made here, to be filled up")
    ended, _ = soak.cycle(name, [trap], own_writer)
    assert ended.counts.of(trap.rank, "sprung")
