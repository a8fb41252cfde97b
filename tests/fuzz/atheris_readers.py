"""The readers of bytes under atheris, which looks for inputs that take new ways through the code.

    pip install atheris
    PYTHONPATH=. python tests/fuzz/atheris_readers.py lines -max_total_time=300

NAME is one of lines, index, metadata, safetensors and yaml; what follows it is libFuzzer's. It ends
at the first input for which a reader raises another error than those that commands turn into one
sentence, takes 10 s or 2 GB, and leaves it in a file. It is no part of `make test`.
"""

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

FOLDER = Path(tempfile.mkdtemp(prefix="atheris-"))


def lines(data: bytes) -> None:
    from megatron_dr.data import records

    path = FOLDER / "a.jsonl"
    path.write_bytes(data)
    for _, raw in records.read_file(str(path)):
        records.parse(raw)


def index(data: bytes) -> None:
    from tests.fuzz import test_indexed

    test_indexed.read((data, test_indexed.DATA))


def metadata(data: bytes) -> None:
    from megatron_dr.hf import unpickling

    path = FOLDER / ".metadata"
    path.write_bytes(data)
    unpickling.check_metadata(FOLDER, unpickling.read_metadata(path))


def safetensors(data: bytes) -> None:
    from megatron_dr.hf.source import Source

    (FOLDER / "model.safetensors").write_bytes(data)
    found = Source(FOLDER)
    for name in found.places:
        shape, _ = found.about(name)
        found.read(name, tuple((0, min(size, 2)) for size in shape))


def yaml(data: bytes) -> None:
    from megatron_dr.config import yaml_file

    path = FOLDER / "a.yaml"
    path.write_bytes(data)
    yaml_file.plain(yaml_file.read(path))


READERS = {read.__name__: read for read in (lines, index, metadata, safetensors, yaml)}


def seeds(name: str) -> list[bytes]:
    """Whole inputs, to begin with."""
    if name == "lines":
        module = importlib.import_module("tests.fuzz.test_records")
        return [module.lines_of(module.SAMPLES)]
    if name == "index":
        return [importlib.import_module("tests.fuzz.test_indexed").GOOD]
    if name == "metadata":
        module = importlib.import_module("tests.fuzz.test_checkpoints")
        return [module.folder()[module.META]]
    if name == "safetensors":
        return [importlib.import_module("tests.fuzz.test_weights").saved()]
    return importlib.import_module("tests.fuzz.test_yaml")._BASES  # type: ignore[no-any-return]


def bounded(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def one(data: bytes) -> None:
        with contextlib.suppress(ValueError, OSError):
            read(data)

    return one


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in READERS:
        sys.exit(f"atheris_readers: give one of {', '.join(READERS)}.")
    with atheris.instrument_imports(include=["megatron_dr"]):
        for module in ("data.records", "data.indexed", "hf.unpickling", "hf.source",
                       "config.yaml_file"):  # fmt: skip
            importlib.import_module(f"megatron_dr.{module}")
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(seed)
    flags = ["-timeout=10", "-rss_limit_mb=4096", *sys.argv[2:], str(corpus)]
    atheris.Setup([sys.argv[0], *flags], bounded(READERS[name]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
