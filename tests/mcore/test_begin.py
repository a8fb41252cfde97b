"""Found before a run begins: folders that can't be written, checkpoints that aren't there."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dr.mcore import errors
from megatron_dr.mcore.loop import begin


class Left(Exception):
    """In place of exit code 2."""


@pytest.fixture(autouse=True)
def leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(message: str) -> None:
        raise Left(message)

    monkeypatch.setattr(errors, "leave", leave)


def test_folders_for_checkpoints(tmp_path: Path) -> None:
    """One that can't be written is found; one that can is made, and left as it was."""
    (tmp_path / "file").touch()
    good, bad = tmp_path / "new" / "folder", tmp_path / "file" / "folder"
    names = ("save", "non_persistent_global_ckpt_dir", "non_persistent_local_ckpt_dir")
    nothing = dict.fromkeys((*names, "load", "pretrained_checkpoint", "ckpt_step"))
    nothing["skip_train"] = None
    begin.check_folders(Namespace(**nothing, non_persistent_ckpt_type=None))
    begin.check_folders(Namespace(**{**nothing, "save": str(good)}, non_persistent_ckpt_type=None))
    assert good.is_dir() and not list(good.iterdir())
    for name, kind in zip(names, (None, "global", "local"), strict=True):
        args = Namespace(**{**nothing, name: str(bad)}, non_persistent_ckpt_type=kind)
        with pytest.raises(ValueError) as refused:
            begin.check_folders(args)
        assert str(refused.value) == (
            f"--{name.replace('_', '-')} {bad}: checkpoints can't be written there (Not a "
            "directory): mend it, or name another folder."
        )
    unused = Namespace(**{**nothing, names[1]: str(bad)}, non_persistent_ckpt_type=None)
    begin.check_folders(unused)  # no checkpoint goes there


@pytest.mark.parametrize("text, saved, wrong", [
    ("", True, "it is empty"), ("7\n", True, None),
    ("itera", True, "it says 'itera'"), ("-1", False, "it says '-1'"),
    ("3\n", True, None), ("release", False, None),
])  # fmt: skip
def test_the_note_of_the_last_checkpoint(
    tmp_path: Path, text: str, saved: bool, wrong: str | None
) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text(text)
    if saved:
        (tmp_path / "iter_0000003").mkdir()

    def stock(name: str) -> str:
        return f"read {name}"

    if wrong is None:
        assert begin.read_tracker(stock, str(tracker)) == f"read {tracker}"
        return
    last = " (the newest folder is iter_0000003)" if saved else ""
    with pytest.raises(Left) as left:
        begin.read_tracker(stock, str(tracker))
    assert str(left.value) == (
        f"{tracker}: {wrong}, where the iteration of the last whole checkpoint belongs: write that "
        f"number{last}, or delete the file to begin anew."
    )


def test_a_last_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    """Unless another is chosen by --ckpt-step."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    args = Namespace(
        save=None, non_persistent_global_ckpt_dir=None, non_persistent_local_ckpt_dir=None,
        load=str(tmp_path), pretrained_checkpoint=None, ckpt_step=None, skip_train=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="it says '7', and there is no such checkpoint, where"):
        begin.check_folders(args)
    args.ckpt_step = 3
    begin.check_folders(args)
    args.ckpt_step = None
    (tmp_path / "iter_0000007").mkdir()
    begin.check_folders(args)


def test_nothing_but_a_checkpoint_is_evaluated(tmp_path: Path) -> None:
    """Of random weights there is nothing to tell; a run that trains begins with them."""
    names = ("save", "non_persistent_global_ckpt_dir", "non_persistent_local_ckpt_dir")
    nothing = dict.fromkeys((*names, "pretrained_checkpoint", "ckpt_step"))
    args = Namespace(
        **nothing, load=str(tmp_path), non_persistent_ckpt_type=None, skip_train=True
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"--load {tmp_path}: no checkpoint is there .* random"):
        begin.check_folders(args)
    args.skip_train = False
    begin.check_folders(args)
    args.skip_train, args.pretrained_checkpoint = True, str(tmp_path)
    begin.check_folders(args)


def test_what_megatron_cannot_load_is_no_success() -> None:
    """It leaves with code 0 in several places, after a line that says why."""

    def stock(code: int | None) -> None:
        raise SystemExit(code)

    with pytest.raises(Left, match="no checkpoint was loaded"):
        begin.load(stock, None)
    with pytest.raises(SystemExit) as left:
        begin.load(stock, 3)
    assert left.value.code == 3
    assert begin.load(lambda: "loaded") == "loaded"


@pytest.mark.parametrize("done, of, samples, said", [
    (6, 6, None, "6 iterations of 6; raise --train-iters"), (9, 6, None, "9 iterations of 6"),
    (6, 6, 48, "all of --train-samples 48"), (5, 6, None, None), (0, 0, None, None),
])  # fmt: skip
def test_a_run_with_nothing_left_to_train(
    monkeypatch: pytest.MonkeyPatch, done: int, of: int, samples: int | None, said: str | None
) -> None:
    sentences: list[str] = []
    monkeypatch.setattr(begin, "say", sentences.append)
    args = Namespace(
        skip_train=False, train_iters=of, iteration=done, train_samples=samples, load="runs/a"
    )
    if said is None:
        begin.leave_if_complete(args)
        assert not sentences
        return
    with pytest.raises(SystemExit) as left:
        begin.leave_if_complete(args)
    assert left.value.code == 0 and "runs/a is complete" in sentences[0] and said in sentences[0]
    assert "--dr-generate" not in sentences[0]
    args.dr_generate = "asked.jsonl"
    with pytest.raises(SystemExit):
        begin.leave_if_complete(args)
    assert sentences[1] == f"{sentences[0]}; with --skip-train it answers --dr-generate"
    args.skip_train = True  # to validate it
    begin.leave_if_complete(args)
