"""The direction of dependencies: projection <- config, data, report <- mcore -> megatron."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_dr"


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """Full names of everything a file imports, anywhere in it."""
    package = path.relative_to(root).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):  # importlib.import_module("..."), __import__("...")
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in ("import_module", "__import__"):
                first = node.args[0]
                assert isinstance(first, ast.Constant), f"{path}:{node.lineno}: computed import"
                names.add(first.value)
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def files(*folders: str) -> list[Path]:
    found = [p for folder in folders for p in sorted((PACKAGE / folder).rglob("*.py"))]
    assert found
    return found


def outside_mcore() -> list[Path]:
    return [p for p in files(".") if PACKAGE / "mcore" not in p.parents]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files("projection"), ids=name)
def test_projection_imports_torch_and_itself_alone(path: Path) -> None:
    for imports in imported(path):
        top = imports.split(".")[0]
        ours = within(imports, "megatron_dr.projection")
        assert ours or top == "torch" or top in sys.stdlib_module_names, imports


@pytest.mark.parametrize("path", outside_mcore(), ids=name)
def test_mcore_alone_imports_megatron(path: Path) -> None:
    assert not [n for n in imported(path) if within(n, "megatron")]


@pytest.mark.parametrize("path", files("hf"), ids=name)
def test_hf_imports_torch_and_safetensors_alone(path: Path) -> None:
    for imports in imported(path):
        top = imports.split(".")[0]
        ours = within(imports, "megatron_dr.hf")
        assert ours or top in ("torch", "safetensors") or top in sys.stdlib_module_names, imports


@pytest.mark.parametrize(
    "path", files("data", "report", "projection", "optim", "rl", "compare", "launch"), ids=name
)
def test_leaves_do_not_import_mcore(path: Path) -> None:
    assert not [n for n in imported(path) if within(n, "megatron_dr.mcore")]


@pytest.mark.parametrize("path", files("optim"), ids=name)
def test_optim_imports_torch_and_projection_alone(path: Path) -> None:
    for imports in imported(path):
        top = imports.split(".")[0]
        ours = within(imports, "megatron_dr.optim") or within(imports, "megatron_dr.projection")
        assert ours or top == "torch" or top in sys.stdlib_module_names, imports


@pytest.mark.parametrize("path", files("plan"), ids=name)
def test_plan_imports_the_standard_library_and_itself_alone(path: Path) -> None:
    for imports in imported(path):
        ours = within(imports, "megatron_dr.plan")
        assert ours or imports.split(".")[0] in sys.stdlib_module_names, imports


# Rooms of mcore, from the ground up: each imports from the ones before it, and from itself.
ROOMS = (
    "", "cpu", "step", "seams", "buffer_rows", "layer_rows", "attach", "model", "convert", "data",
    "rollouts", "dpo", "rl", "hosts", "loop", "gpu_check",
)  # fmt: skip


def room(name: str) -> str:
    """Of a module of mcore: the part after it; of a file that lies in no room but attach, empty,
    and of compat, which its own files and these import."""
    first = [*name.split("."), "", ""][2].replace("compat", "")
    return first if first == "attach" or (PACKAGE / "mcore" / first).is_dir() else ""


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in files(".")}


def imported_modules(path: Path) -> set[str]:
    """Ours among what a file imports."""
    names = {n if n in MODULES else n.rpartition(".")[0] for n in imported(path)}
    return (names & MODULES.keys()) - {module(path)}


@pytest.mark.parametrize("path", files("mcore"), ids=name)
def test_no_arrow_goes_back_up(path: Path) -> None:
    here = ROOMS.index(room(module(path)))
    for other in imported_modules(path):
        if within(other, "megatron_dr.mcore"):
            assert ROOMS.index(room(other)) <= here, other


def test_every_room_is_in_the_list() -> None:
    folders = {p.name for p in (PACKAGE / "mcore").iterdir() if (p / "__init__.py").exists()}
    assert folders == set(ROOMS) - {"", "attach"} | {"compat"}


def test_no_import_circle() -> None:
    """Within functions too."""
    arrows = {name: imported_modules(path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in arrows[name]:
                visit(other, (*path, name))
            done.add(name)

    for each in arrows:
        visit(each, ())


def test_mcore_does_import_megatron() -> None:
    """The reader of imports sees what is there, as do the rules above."""
    assert any(within(n, "megatron") for p in files("mcore") for n in imported(p))
    assert "megatron_dr.projection.FeasibleSet" in imported(PACKAGE / "config" / "kinds.py")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("import megatron.core as mc", "megatron.core"),
        ("from megatron import core", "megatron.core"),
        ("def f():\n    from megatron.core import mpu", "megatron.core.mpu"),
        ("from ..mcore.step import handle", "megatron_dr.mcore.step.handle"),
        ("from .. import mcore", "megatron_dr.mcore"),
        ("from . import order", "megatron_dr.data.order"),
        ("import importlib\nimportlib.import_module('megatron')", "megatron"),
        ("__import__('megatron')", "megatron"),
    ],
)
def test_every_way_to_import_is_seen(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "megatron_dr" / "data" / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert expected in imported(path, tmp_path)


def test_importing_us_imports_no_megatron() -> None:
    code = """if True:
        import sys
        import megatron_dr
        import megatron_dr.config.dr, megatron_dr.projection
        import megatron_dr.data.domains, megatron_dr.data.encode, megatron_dr.data.order
        import megatron_dr.report.metrics
        found = [m for m in sys.modules if m == "megatron" or m.startswith("megatron.")]
        assert not found, found
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", ["rl.reward_worker", "rl.rewards", "rl.sandbox.launcher"])
def test_what_starts_often_starts_without_torch(module: str) -> None:
    """Which takes two seconds and 300 MB of each reward worker."""
    code = f"import sys, megatron_dr.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
