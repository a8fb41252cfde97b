"""Splits by content: no record on two sides, the same ones again, duplicates together."""

import json
from pathlib import Path

import pytest

from megatron_dr.compare import splits

Lines = list[str]


def write(path: Path, texts: Lines) -> str:
    lines = [json.dumps({"text": text, "number": n}) + "\n" for n, text in enumerate(texts)]
    path.write_text("".join(lines))
    return str(path)


def texts(path: Path) -> Lines:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    """20 target texts, one of them three times; of 100 general ones two are the target's."""
    target = [f"target {n}" for n in range(20)]
    general = [f"general {n % 90}" for n in range(100)] + ["target 3", "target 4"]
    return (write(tmp_path / "t.jsonl", [*target, "target 7", "target 7"]),
            write(tmp_path / "g.jsonl", general))  # fmt: skip


def test_no_text_is_on_two_sides(data: tuple[str, str], tmp_path: Path) -> None:
    found = splits.make(*data, tmp_path / "out", 0)
    sides = {(role, part): set(texts(path)) for role, files in found.files.items()
             for part, path in files.items()}  # fmt: skip
    assert sum(map(len, sides.values())) == len(set.union(*sides.values())) == 20 + 90
    assert (
        sum(found.counts["target"].values()) == 22 and sum(found.counts["general"].values()) == 100
    )
    assert 4 <= found.counts["target"]["test"] <= 5 <= 10 <= found.counts["target"]["train"]
    assert any("2 left out, which the target has too" in line for line in found.said)
    for role, files in found.files.items():  # equal ones are all there, on their side
        for part, path in files.items():
            assert len(texts(path)) == found.counts[role][part]


def test_the_same_again_and_others_by_another_seed(data: tuple[str, str], tmp_path: Path) -> None:
    def made(name: str, seed: int) -> list[str]:
        found = splits.make(*data, tmp_path / name, seed)
        return [path.read_text() for files in found.files.values() for path in files.values()]

    assert made("a", 0) == made("b", 0) != made("c", 1)
    one, two = ((tmp_path / n / "splits.json").read_text() for n in "ab")
    assert json.loads(one)["files"] == json.loads(two)["files"]


def test_order_does_not_matter(tmp_path: Path) -> None:
    """A record is chosen by what it says, not by where it stands."""
    found = splits.contents(write(tmp_path / "a.jsonl", [f"text {n}" for n in range(30)]))
    sides = splits.parts("--target", "a", found, 3)
    assert (splits.parts("--target", "a", found[::-1], 3) == sides[::-1]).all()


def test_too_few(tmp_path: Path) -> None:
    target = write(tmp_path / "t.jsonl", [f"text {n % 15}" for n in range(40)])
    with pytest.raises(ValueError, match=r"--target .*t.jsonl: 15 different .* at least 16"):
        splits.make(target, target, tmp_path / "out", 0)


def test_no_samples(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"prompt": "b", "answer": "c"}\n')
    with pytest.raises(ValueError, match=r"t.jsonl:2: a record must have .* 'prompt', 'answer'"):
        splits.contents(str(tmp_path / "t.jsonl"))


def test_a_general_set_that_is_the_target(tmp_path: Path) -> None:
    target = write(tmp_path / "t.jsonl", [f"text {n}" for n in range(40)])
    with pytest.raises(ValueError, match=r"--general .*: 0 different records of its own"):
        splits.make(target, target, tmp_path / "out", 0)
