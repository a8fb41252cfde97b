"""What a record says, beside the same by hand; and the sub-command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pytest

from megatron_dr.cli.weights import main
from megatron_dr.data.identities import content
from megatron_dr.report import contents, record, weights

from ._record import row, written

TEXTS = [{"text": f"number {n}"} for n in range(6)]
WEIGHTS = [[0.0, 1.5, 3.0, 0.5], [2.0, 0.5, 3.0, 1.5]]  # of two steps, lines 1 to 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return path


def sample(data: Path, step: int, line: int, weight: float, **more: Any) -> dict[str, Any]:
    corpus = f"{data}" if line < 3 else "other.jsonl"
    own = {"corpus": corpus, "file": str(data), "line": line, "hash": content(TEXTS[line - 1])}
    return row(step, line, weight, **own | more)


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    return written(tmp_path / "r", [
        sample(data, step, line, weight, score=0.1 * line if step == 1 else None)
        for step, of_step in enumerate(WEIGHTS, 1) for line, weight in enumerate(of_step, 1)
    ])  # fmt: skip


def test_means_of_samples_and_corpora(folder: Path) -> None:
    table = record.read(folder)
    found = weights.samples(table).to_pylist()
    assert [(one["line"], one["weight"], one["rows"]) for one in found] == [
        (3, 3.0, 2), (1, 1.0, 2), (2, 1.0, 2), (4, 1.0, 2)
    ]  # fmt: skip
    assert [one["score"] for one in found] == pytest.approx([0.3, 0.1, 0.2, 0.4])
    first, second = weights.corpora(table).to_pylist()
    assert first["corpus"] == "other.jsonl"
    assert (first["weight"], second["weight"]) == (2.0, 1.0)
    assert (first["share"], second["share"]) == pytest.approx((2 / 3, 1 / 3))


def test_a_slot_gives_its_samples_its_weight(tmp_path: Path) -> None:
    ids = {"id": json.dumps(["a", "b"]), "hash": json.dumps(["text:0", "text:1"])}
    both = row(1, 0, 2.0, kind="slot", **ids)
    one = row(2, 0, 0.5, kind="slot", id=json.dumps(["a"]), hash=json.dumps(["text:0"]))
    found = weights.samples(record.read(written(tmp_path, [both, one]))).to_pylist()
    assert [(each["id"], each["weight"], each["rows"]) for each in found] == [
        ("b", 2.0, 1), ("a", 1.25, 2)
    ]  # fmt: skip


def test_a_blend_has_the_shares_of_all_weight(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    found, without = weights.blend(record.read(folder))
    assert found == pytest.approx({str(data): 4 / 12, "other.jsonl": 8 / 12}) and not without
    assert main([str(folder), "--blend"]) == 0
    assert f"--train-data-path 0.33333 {data} 0.66667 other.jsonl" in capsys.readouterr().out
    assert main([str(folder), "--blend", str(tmp_path / "blend.txt")]) == 0
    assert (tmp_path / "blend.txt").read_text() == f"0.33333 {data} 0.66667 other.jsonl\n"


def test_domain_rows_blend_by_path_without_what_has_no_weight(tmp_path: Path) -> None:
    rows = [row(1, n, w, kind="domain", corpus=name, file=f"data/{name}.jsonl")
            for n, (name, w) in enumerate([("en", 0.5), ("de", 1.5), ("fr", -0.1)])]  # fmt: skip
    found = weights.blend(record.read(written(tmp_path, rows)))
    assert found == ({"data/de.jsonl": 0.75, "data/en.jsonl": 0.25}, ["data/fr.jsonl"])


@pytest.mark.parametrize(
    "rows, left_out, message",
    [
        ([row(1, 0, 1.0, corpus="a")], 2, "a blend is made of all rows"),
        ([row(1, 0, 1.0)], 0, "a blend needs the corpus of each row"),
        ([row(1, 0, float("nan"), corpus="a")], 0, "a blend needs finite weights"),
        ([row(1, 0, -1.0, corpus="a")], 0, "no corpus has a positive weight"),
    ],
)
def test_a_blend_that_would_mislead_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], left_out: int, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([str(written(tmp_path, rows, left_out)), "--blend"]) == 2
    assert message in capsys.readouterr().err


def test_lines_are_kept_by_their_mean_weight(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, lines = tmp_path / "out.jsonl", data.read_text().splitlines(keepends=True)
    assert main([str(folder), "--filter", str(data), str(out), "--keep-above", "1"]) == 0
    assert out.read_text() == lines[2]
    said = " ".join(capsys.readouterr().out.split())
    assert "1 lines kept, 3 of less weight and 2 that the record has no weight of left out" in said
    assert main([str(folder), "--filter", str(data), str(out), "--keep-above", "1"]) == 2
    assert "it is there already" in capsys.readouterr().err
    moved, share = tmp_path / "elsewhere" / "data.jsonl", tmp_path / "share.jsonl"
    moved.parent.mkdir()
    data.rename(moved)
    assert main([str(folder), "--filter", str(moved), str(share), "--keep-share", "0.5"]) == 0
    assert share.read_text() == "".join(lines[:4])  # three share the border


def test_other_data_is_refused(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = data.read_text().splitlines(keepends=True)
    rest = ["--filter", str(data), str(tmp_path / "out.jsonl"), "--keep-above", "1"]
    data.write_text("".join([*lines[:2], '{"text": "changed"}\n', *lines[3:]]))
    for asked in (rest, ["--blend"]):
        assert main([str(folder), *asked]) == 2
        assert f"{data}:3: its content is not what the record has" in capsys.readouterr().err
    data.write_text("".join(lines[:3]))
    for asked in (rest, ["--blend"]):
        assert main([str(folder), *asked]) == 2
        assert "it ends with line 3, and the record has line 4" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    rest[1] = str(other)
    assert main([str(folder), *rest]) == 2
    assert "the record has no sample of it" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_without_weights_is_refused(data: Path, tmp_path: Path) -> None:
    for n, row_ in enumerate(
        (sample(data, 1, 1, 1.0, hash=None), sample(data, 1, 1, float("nan")))
    ):
        samples = weights.samples(record.read(written(tmp_path / f"r{n}", [row_])))
        with pytest.raises(ValueError, match="the record has no weight of any of its lines"):
            contents.filtered(samples, {}, data, tmp_path / "out.jsonl", lambda _: 0.0)


def test_a_prepared_dataset_is_known_by_its_input(data: Path, tmp_path: Path) -> None:
    import hashlib

    rows = [row(1, n, float(n), file=str(data), line=n + 1, hash=f"tokens:{n}") for n in range(2)]
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    table = record.read(written(tmp_path / "r", rows, **{str(data): sha256}))
    samples, files = weights.samples(table), record.about(table)["files"]
    found = contents.filtered(samples, files, data, tmp_path / "out.jsonl", lambda _: 0.5)
    assert found == {"kept": 1, "below": 1, "unknown": 4}
    data.write_text(data.read_text() + " \n")
    with pytest.raises(ValueError, match="its content is not that of"):
        contents.filtered(samples, files, data, tmp_path / "2.jsonl", lambda _: 0.5)


def test_slots_of_a_file_are_known_by_their_content(data: Path, tmp_path: Path) -> None:
    hashes = [content(text) for text in TEXTS[:2]]
    both = row(1, 0, 2.0, kind="slot", file=str(data), id='["a", "b"]', hash=json.dumps(hashes))
    samples = weights.samples(record.read(written(tmp_path / "r", [both])))
    found = contents.filtered(samples, {}, data, tmp_path / "out.jsonl", lambda _: 1.0)
    assert found == {"kept": 2, "below": 0, "unknown": 4}
    data.write_text(json.dumps(TEXTS[1]) + "\n")
    with pytest.raises(ValueError, match="1 of the 2 samples that the record has"):
        contents.filtered(samples, {}, data, tmp_path / "2.jsonl", lambda _: 1.0)


LAYERED = {
    "embedding.word_embeddings.weight": [1.0, 2.0, 3.0, 4.0],
    "decoder.layers.0.self_attention.linear_qkv.weight": [0.5, 2.0, 1.0, 4.0],
    "decoder.layers.0.mlp.linear_fc1.weight": [1.0, 1.0, 1.0, 1.0],
    "decoder.layers.10.mlp.linear_fc1.weight": [4.0, 3.0, 2.0, 1.0],
    "decoder.layers.2.mlp.linear_fc1.weight": [1.0, 1.0, 1.0, 1.0],
}


def test_layers_beside_numpy(tmp_path: Path) -> None:
    rows = [row(1, n, w, block=block) for block, own in LAYERED.items() for n, w in enumerate(own)]
    rows.append(row(2, 0, 9.0, block="embedding.word_embeddings.weight"))  # of one block alone
    by_layer, by_type = weights.layers(record.read(written(tmp_path / "r", rows)))
    assert [*by_layer] == ["embedding.word_embeddings", "decoder.layers.0", "decoder.layers.2",
                           "decoder.layers.10"]  # fmt: skip
    assert [*by_type] == ["embedding", "mlp", "attention"]
    whole = np.mean([*LAYERED.values()], 0)
    ranks = lambda x: np.argsort(np.argsort(x)).astype(float)  # noqa: E731
    own = LAYERED["decoder.layers.10.mlp.linear_fc1.weight"]
    wanted = np.corrcoef(ranks(own), ranks(whole))[0, 1]
    assert by_layer["decoder.layers.10"].spearman == pytest.approx(wanted)
    assert np.isnan(by_layer["decoder.layers.2"].spearman)  # constant
    assert by_layer["decoder.layers.0"].blocks == 2
    assert by_type["embedding"].magnitude == 2.5 and by_type["embedding"].moved == 1.5


def test_layers_as_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(1, n, w, block=block) for block, own in LAYERED.items() for n, w in enumerate(own)]
    folder = str(written(tmp_path / "r", rows))
    assert main([folder, "--layers", "--png", str(tmp_path / "layers.png")]) == 0
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    assert "decoder.layers.10" in capsys.readouterr().out


def test_every_sample_as_a_file(folder: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("samples.csv", "samples.parquet")]
    assert main([str(folder), "--csv", paths[0], "--parquet", paths[1]]) == 0
    found = pyarrow.csv.read_csv(paths[0])
    assert found["line"].to_pylist() == pyarrow.parquet.read_table(paths[1])["line"].to_pylist()
    assert found["weight"].to_pylist()[0] == 3.0


@pytest.mark.parametrize(
    "flags, message",
    [
        ("nowhere", "no record is there"),
        ("{} --filter a b", "--filter needs one of --keep-above and --keep-share"),
        ("{} --keep-above 1", "--filter needs one of"),
        ("{} --filter a b --keep-share 0", "--keep-share must be above 0"),
        ("{} --filter a b --keep-above nan", "a finite number"),
        ("{} --png a.png", "--png is of --layers"),
        ("{} --top 0", "--top must be at least 1"),
        ("{} --layers", "the record has one block, model"),
        ("{} --filter a b --keep-above 1", "a file of JSON lines"),
    ],
)
def test_wrong_input_is_one_sentence(
    folder: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags.format(folder).split()) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("weights: ") and said.count("\n") == 1


def test_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "8 rows of 1 block(s) in steps 1 to 2" in said
    assert "mean weight of 4 samples" in said and "mean weight by corpus" in said
