"""Files of YAML: the plugin's flags, and recipes."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megatron_dr.config import yaml_file
from megatron_dr.launch import recipe

from ._cases import TEXTS, damaged, fuzzed, refused

_HERE = Path(__file__).parents[2] / "examples" / "cluster"
_BASES = [
    b"set: cone\nalpha: 1e-3\nrows: sample\nblocks: [layer, matrix]\nlog-blocks: true\nx: {y: 1}\n",
    b"a: !!int 5\nb: !!float 1.5\nc: !!bool yes\nd: !!null ~\ne: 2001-01-01\nf: 0x1F\ng: 1:2:3\n",
    b"a: &b [1, 2]\nc: *b\n",
    b"? [1]\n: 2\n<<: {a: 1}\n---\nb: 3\n",
    b"a: |\n  text\n  more\nb: >-\n  folded\n",
]


def read(case: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        path.write_bytes(case)

        def plain() -> None:
            yaml_file.plain(yaml_file.read(path))

        refused(plain, path)


_TAGGED = st.tuples(
    st.sampled_from(["!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!str", "!x", "!!set",
                     "!!python/object/apply:os.system", "!!binary", "!!map", "!!seq", "&a", "*a"]),
    st.sampled_from(['""', "x", "1", ".", "-", "+", "0x", "0b", "1:", ":1", "_", "[]", "{}", "~",
                     "9" * 5000, "1e999", "-.inf", ".nan", "0o9", "[" * 400, "{a: " * 300]),
).map(lambda pair: f"a: {pair[0]} {pair[1]}\n".encode())  # fmt: skip
FAILED = [
    b"a: !!bool x\n", b'a: !!int ""\n', b'a: !!float ""\n', b'? !!int ""\n: 1\n', b"a: !!null x\n",
    b"[" * 1500, b"a: " + b"{b: " * 1000,
]  # fmt: skip
test_read, test_read_long = fuzzed(read, damaged(_BASES) | _TAGGED, 40, 3000, FAILED)


def entry_of(case: str) -> None:
    assert not refused(lambda: yaml_file.entry_of(case))


test_entry, test_entry_long = fuzzed(
    entry_of, _TAGGED.map(lambda case: case.decode()[3:-1]) | TEXTS, 40, 1500,
    ["!!bool x", '!!int ""', "[" * 1000, "\0"],
)  # fmt: skip

_FILES = {
    name: (_HERE / name).read_bytes()
    for name in ("common.yaml", "models/llama-3.1-8b.yaml", "methods/lora.yaml")
}


def read_recipe(case: tuple[str, bytes, str]) -> None:
    """One of a recipe's files damaged."""
    name, content, given = case
    with tempfile.TemporaryDirectory() as folder:
        for part in ("models", "methods"):
            Path(folder, part).mkdir()
        for each in _FILES:
            shutil.copyfile(_HERE / each, Path(folder, each))
        Path(folder, name).write_bytes(content)

        def whole() -> None:
            found = recipe.read_recipe(Path(folder), "llama-3.1-8b/lora", [given])
            for of in found.table:
                found.text(of), found.texts(of), found.value(of)
            recipe.names_of(Path(folder))

        refused(whole)


_MODEL = "models/llama-3.1-8b.yaml"
_RECIPES: Any = st.one_of(
    *(st.tuples(st.just(name), damaged([content]), st.just("a=b") | TEXTS)
      for name, content in _FILES.items()),
    st.tuples(st.just("common.yaml"), st.just(_FILES["common.yaml"]),
              st.tuples(st.sampled_from([*recipe._FORM, "layout.tp", "files.data", "dr.set", "x"]),
                        TEXTS | st.just("[[{}]]")).map("=".join)),
)  # fmt: skip
FAILED_RECIPES = [
    (_MODEL, b"sizes: {a: {}}\n", "gpus=1"),
    (_MODEL, b"sizes: {a: {for: 5}}\n", "gpus=1"),
    (_MODEL, b"sizes: {a: {for: }}\n", "gpus=1"),
    (_MODEL, b"sizes: {a: 1}\n", "gpus=1"),
]
test_recipe, test_recipe_long = fuzzed(read_recipe, _RECIPES, 30, 600, FAILED_RECIPES)
