"""The recipes of examples/paper: their data, their flags by Megatron's own checks, their runs."""

import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dr.compare import start
from megatron_dr.mcore import compat

from ._ranks import run_ranks
from ._train import ROOT, launch

sys.path.append(str(ROOT / "examples" / "paper"))

import prepare  # noqa: E402
import recipe  # noqa: E402
import run as paper  # noqa: E402
import small  # noqa: E402

ARMS = [(s, arm) for s in recipe.SETTINGS for arm in recipe.read(s, False).arms]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings' data in the authors' formats, and a tokenizer of bytes."""
    out = tmp_path_factory.mktemp("paper")
    start.byte_tokenizer(out / "tokenizer")
    for setting in recipe.SETTINGS:
        small.MAKE[setting](out / setting, recipe.read(setting, True).data)
    return out


@cache
def tokenizer(out: Path) -> Any:
    import transformers

    found = transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
    found.chat_template = (ROOT / "examples/paper/chat.jinja").read_text(encoding="utf-8")
    return found


def files(made: Path, setting: str) -> dict[str, Path]:
    wanted, out = recipe.read(setting, True).data, made / f"{setting}-prepared"
    return prepare.PREPARE[setting](made / setting, out, wanted, tokenizer(made), 2)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- flags ---------------------------------------------------------------------------------------
def checked(argv: list[str]) -> tuple[int, str]:
    """On a rank: exit code and errors of a run that ends where Megatron's loop would begin."""
    begun: list[Any] = []
    compat.pretrain = lambda *args, **_: begun.append(args)
    code, _, error = launch(argv)
    assert len(begun) == (code == 0)
    return code, error


@pytest.mark.parametrize("setting", recipe.SETTINGS)
def test_megatron_takes_the_flags(made: Path, setting: str) -> None:
    """Its own parser and checks, and ours, up to the loop's beginning: of every arm as a whole."""
    found = recipe.read(setting, False)
    begun = start.from_scratch(made / "tokenizer", made)
    known: dict[str, Any] = files(made, setting)
    if found.reward_model:
        known = {**known, "reward": small.reward_model(made / "reward")}
    template = "" if found.template else f"--chat-template {ROOT}/examples/paper/chat.jinja"
    for arm in found.arms:
        flags = f"{begun.flags} {template} --dr-device cpu {found.flags(arm, known)} --seed 2"
        ((code, error),) = run_ranks(1, checked, flags.split())
        assert code == 0, (arm, error[-2000:])


def test_the_last_of_a_flag_counts_and_no_part_is_left() -> None:
    known = {name: Path("x") for name in ("general", "target", "held_out", "reward")}
    for setting, arm in ARMS:
        whole = recipe.read(setting, False).flags(arm, known)
        assert "{" not in whole and whole.endswith(f"{recipe.read(setting, False).steps}")
    words = recipe.read("sft", True).flags("FullTraining-LoRA", known, 3).split()
    assert words[len(words) - words[::-1].index("--lr")] == "2e-3" and words[-1] == "3"
    with pytest.raises(ValueError, match="--arms Mean: there are FullTraining-Full, "):
        recipe.read("sft", False).check("Mean")


# -- data ----------------------------------------------------------------------------------------
def test_samples_are_chosen_by_the_authors_draws(made: Path) -> None:
    wanted = recipe.read("sft", True).data
    found = files(made, "sft")
    general = lines(made / "sft" / wanted["general"])
    torch.manual_seed(3)  # the run's seed and one
    order = torch.randperm(len(general))[: int(len(general) * wanted["share"])].tolist()
    messages = [r["messages"] for r in lines(found["general"])]
    assert messages == [general[n]["messages"] for n in order]
    target = lines(made / "sft" / wanted["target"])
    random.Random(2).shuffle(target)
    chosen = [r["messages"] for r in lines(found["target"])]
    assert 8 < len(chosen) <= wanted["targets"]
    assert chosen == [r["messages"] for r in target if r["messages"] in chosen][: len(chosen)]
    length = prepare.lengths(tokenizer(made))
    mean = sum(length(general[n]["messages"]) for n in order) / len(order)
    assert max(map(length, chosen)) <= 1.2 * mean


def test_prompts_are_beginnings_of_what_is_toxic_enough(made: Path) -> None:
    wanted = recipe.read("rlhf", True).data
    found = files(made, "rlhf")
    records = lines(made / "rlhf" / wanted["prompts"])
    above = [r["prompt"]["text"] + r["continuation"]["text"] for r in records
             if r["prompt"]["toxicity"] > wanted["above"]]  # fmt: skip
    general, held_out = (
        [r["prompt"] for r in lines(found[name])] for name in ("general", "held_out")
    )
    assert len(general) == int(0.8 * len(above)) and len(held_out) == wanted["held_outs"]
    chance = random.Random(2)
    cuts = [chance.randint(10, 15) for _ in above]
    begun = [text[:cut] for text, cut in zip(above, cuts, strict=True)]  # a byte is a token
    assert general + held_out == begun[: len(general) + len(held_out)]


def test_what_a_conversation_is_rendered_as(made: Path) -> None:
    from megatron_dr.data.chat import Chat

    own = tokenizer(made)
    chat = [{"role": "user", "content": " a? "}, {"role": "assistant", "content": "b "}]
    assert own.apply_chat_template(chat, tokenize=False) == (
        f"<|user|>\na?\n<|assistant|>\nb{own.eos_token}\n"
    )
    asked = own.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>\na?\n<|assistant|>\n"
    part = Chat(own).encode(chat)
    assert own.decode(part.ids[part.mask == 1].tolist()) == f"b{own.eos_token}\n"


def test_missing_files_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Path
) -> None:
    for setting in recipe.SETTINGS:
        wanted = recipe.read(setting, False).data
        with pytest.raises(ValueError, match="no such file; examples/paper/README.md says what it"):
            prepare.PREPARE[setting](tmp_path, tmp_path, wanted, tokenizer(made), 2)
    for words in (["sft"], ["sft", "--small", "--data", "x"], ["rlhf", "--model", str(made)],
                  ["rlvr", "--small", "--steps", "0"]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            paper.main(words)
        assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--model must be a folder, or give --small." in said
    assert "--small makes its own: drop --data." in said


# -- runs ----------------------------------------------------------------------------------------
@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", recipe.SETTINGS)
def test_the_small_form_runs_to_its_end(setting: str, tmp_path: Path) -> None:
    assert paper.main([setting, "--small", "--steps", "2", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for arm in recipe.read(setting, True).chosen:
        assert f"| {arm} |" in table
