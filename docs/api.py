"""Makes api.md from the docstrings. Sources are read, not imported, but for DRConfig's own.

python docs/api.py
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from megatron_dr import DRConfig

ROOT = Path(__file__).parents[1]
SETS = "Mean Target TopK Greedy Filter Capped Hull Cone Span Ball Halfspace".split()

# Title, a sentence, and what is shown: `module:name`, or a module for all its public names that no
# entry before has shown.
SECTIONS = [
    ("Attach", "How a run begins.",
     ["megatron_dr:enable", "megatron_dr:attach", "megatron_dr:Handle", "megatron_dr:DRConfig"]),
    ("Feasible sets", "Pictures and advice are in [feasible-sets.md](feasible-sets.md).",
     [f"megatron_dr.projection:{name}" for name in ("FeasibleSet", *SETS)]),
    ("Projection", "Pure functions of inner products; they import torch alone.",
     ["megatron_dr.projection", "megatron_dr.projection.rule"]),
    ("Optimizers", "Moments in a compressed space: [meso.md](meso.md).",
     ["megatron_dr.mcore.model.meso:use_meso", "megatron_dr.optim"]),
    ("Hosts", "How verl, slime and NeMo-RL are joined: [rl_systems.md](rl_systems.md).",
     ["megatron_dr.mcore.hosts", "megatron_dr.mcore.hosts.verl:register",
      "megatron_dr.mcore.hosts.verl:engine_class", "megatron_dr.mcore.hosts.slime",
      "megatron_dr.mcore.hosts.nemo_rl"]),
    ("Rollouts", "What samples completions: [rl.md](rl.md).",
     ["megatron_dr.rl.rollouts", "megatron_dr.mcore.rollouts.engine:Engine"]),
    ("Rewards and losses", "A reward of one's own has the signature of these.",
     ["megatron_dr.rl.rewards", "megatron_dr.rl.losses"]),
]  # fmt: skip

QUOTE = "'"
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Module


def page() -> str:
    """The text of api.md."""
    letters = "M rows, N elements, B blocks, R = M + 1 (rows and target), K sketch size"
    parts = ["# API", f"Made from the docstrings by `make docs`. Shape suffixes: {letters}."]
    shown: set[tuple[str, str]] = set()
    for title, sentence, entries in SECTIONS:
        parts += [f"## {title}", sentence]
        for entry in entries:
            module, _, one = entry.partition(":")
            for name in [one] if one else public(module):
                home, node = find(module, name)
                if (home, name) not in shown:
                    parts += entry_of(module if name in public(module) else home, name, node)
                shown.add((home, name))
    return "\n\n".join(parts) + "\n"


@functools.cache
def tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def public(module: str) -> list[str]:
    """`__all__`, or else the classes and functions without an underscore."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    defined = (n.name for n in tree(module).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    return [name for name in defined if not name.startswith("_")]


def find(module: str, name: str) -> tuple[str, Definition]:
    """Where a name is defined; imports are followed, also those of a function that hands on."""
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            inner = (n for n in ast.walk(node) if isinstance(n, ast.ImportFrom))
            onward = [str(n.module) for n in inner if name in [alias.name for alias in n.names]]
            return find(onward[0], name) if onward else (module, node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            base = str(node.module)
            path = ROOT / base.replace(".", "/") / name
            if path.is_dir() or path.with_suffix(".py").exists():
                return f"{base}.{name}", tree(f"{base}.{name}")
            return find(base, name)
    raise LookupError(f"{module}:{name}")


def entry_of(module: str, name: str, node: Definition) -> Iterator[str]:
    """Heading, signature and docstring; of a class its methods' docstrings too."""
    yield f"### {name}"
    lines = [f"from {module} import {name}"]
    if isinstance(node, ast.FunctionDef):
        lines += ["", signature(node)]
    elif isinstance(node, ast.ClassDef):
        lines += ["", *class_lines(module, node)]
    elif isinstance(node, ast.Assign):
        lines += ["", ast.unparse(node)]
    yield "\n".join(["```python", *lines, "```"])
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        yield from text_of(ast.get_docstring(node))
    if name == "DRConfig":
        yield dials()
    for method in methods(node):
        if ast.get_docstring(method) and method.name != "__init__":
            first, *rest = text_of(ast.get_docstring(method))
            yield from (f"**{method.name}**: {first}", *rest)


def methods(node: ast.AST) -> list[ast.FunctionDef]:
    body = node.body if isinstance(node, ast.ClassDef) else []
    return [n for n in body if isinstance(n, ast.FunctionDef)
            and (n.name == "__init__" or not n.name.startswith("_"))]  # fmt: skip


def signature(node: ast.FunctionDef, indent: str = "") -> str:
    """The definition, broken after commas alone."""
    decorators = [f"{indent}@{ast.unparse(d)}\n" for d in node.decorator_list]
    returns = f" -> {ast.unparse(node.returns).strip(QUOTE)}" if node.returns else ""
    line = re.sub("(?<!,) ", "\0", f"def {node.name}({ast.unparse(node.args)}){returns}")
    more = indent + 8 * " "
    text = textwrap.fill(line, 96, initial_indent=indent, subsequent_indent=more,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "".join(decorators) + text.replace("\0", " ")


def lineage(module: str, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """The class, after those of its ancestors that have no public name."""
    for base in (ast.unparse(base) for base in node.bases):
        if base.startswith("_"):
            home, above = find(module, base)
            assert isinstance(above, ast.ClassDef)
            yield from lineage(home, above)
    yield node


def class_lines(module: str, node: ast.ClassDef) -> Iterator[str]:
    """The class as its users see it: bases, public fields, and its methods' signatures."""
    kinds = [*lineage(find(module, node.name)[0], node)]
    yield from (f"@{ast.unparse(d)}" for d in node.decorator_list)
    bases = [ast.unparse(base) for kind in kinds for base in kind.bases]
    seen = ", ".join(base for base in bases if not base.startswith("_"))
    yield f"class {node.name}({seen}):" if seen else f"class {node.name}:"
    for kind in kinds if node.name != "DRConfig" else []:
        lines = (ast.unparse(n) for n in kind.body if isinstance(n, ast.AnnAssign))
        yield from (f"    {line}" for line in lines if not line.startswith("_"))
    yield from (signature(method, "    ") for method in methods(node))


def text_of(doc: str | None) -> list[str]:
    """A docstring as Markdown: its paragraphs as they are, a list for the names of a section."""
    assert doc, "a public name without a docstring"
    parts: list[str] = []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        head, _, body = paragraph.partition("\n")
        if head in ("Args:", "Attributes:", "Raises:"):
            parts += [head, items(body)]
        elif head.startswith(":"):  # :param name: what it is, or :raises Error: when
            parts.append(items(re.sub(r"^:(param |cvar )?", "", paragraph, flags=re.M)))
        elif re.search(r"^\S.*\S  +\S", paragraph, re.M):  # set out in columns
            parts.append(f"```text\n{paragraph}\n```")
        else:
            parts.append(" ".join(paragraph.split()) if head == "Returns:" else paragraph)
    return parts


def items(text: str) -> str:
    """A list of `name: what it is`; deeper lines continue an item."""
    found = re.split(r"^(?=\S)", textwrap.dedent(text), flags=re.M)
    lines = (" ".join(item.split()) for item in found if item)
    marked = (re.sub(r"^(raises )?([\w*., ]+): ", r"\1`\2`: ", line) for line in lines)
    return "\n".join(f"- {line}" for line in marked)


def dials() -> str:
    """DRConfig's fields that have a flag."""
    rows = ["| field | default | meaning | unit |", "|---|---|---|---|"]
    for field in dataclasses.fields(DRConfig):
        if "help" in field.metadata:
            cells = (f"`{field.name}`", f"`{field.default!r}`", field.metadata["help"],
                     field.metadata["unit"])  # fmt: skip
            rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page(), encoding="utf-8")
