"""What of the Bridge adapter can be tried without Bridge, which doesn't import without CUDA."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_dr.mcore.hosts import bridge
from megatron_dr.mcore.refuse import refuse

NAMES = "megatron.bridge.training.utils.checkpoint_utils"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bridge's two names for folders, which are as here in 0.6."""
    module = ModuleType(NAMES)
    module.get_checkpoint_name = lambda folder, step: f"{folder}/iter_{step:07d}"  # type: ignore
    module.is_checkpoint_iteration_directory = (  # type: ignore
        lambda folder: (Path(folder) / "run_config.yaml").exists()
    )
    for part in ("megatron.bridge", "megatron.bridge.training", "megatron.bridge.training.utils"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, NAMES, module)


def test_a_checkpoint_may_be_named_itself(names: None, tmp_path: Path) -> None:
    """`checkpoint.load` holds checkpoints, or is one: then no step's folder is below it."""
    own = tmp_path / "iter_0000100"
    own.mkdir()
    (own / "run_config.yaml").touch()
    assert bridge._loaded(str(tmp_path), 100) == own
    assert bridge._loaded(str(own), 100) == own


@pytest.mark.parametrize("more", [
    {"non_persistent_save_interval": 5}, {"non_persistent_ckpt_type": "global"},
])  # fmt: skip
def test_checkpoints_that_would_lack_the_state_are_refused(more: dict[str, object]) -> None:
    usual = {"non_persistent_save_interval": None, "non_persistent_ckpt_type": None}
    refuse("megatron_dr does not support", bridge._REFUSED, SimpleNamespace(**usual))
    with pytest.raises(ValueError, match="checkpoint.non_persistent.*drop it"):
        refuse("megatron_dr does not support", bridge._REFUSED, SimpleNamespace(**usual | more))
