"""Which way imports point: a part of the package imports only parts in lower rows, wherever in a file it does so.

Read from the source, so an import inside a function counts like one at the top, and so does one under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_ext

ROOT = Path(megatron_ext.__file__).parent
ROWS = [
    {"cli"},
    {"engine"},
    {"checkpoint", "data"},
    {"models", "pipeline"},
    {"layers", "optimizer"},
    {"comm"},
    {"fp8", "parallel"},
    {"config", "kernels"},
]
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}
USES_DEEPSPEED = {"engine", "optimizer", "models"}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.glob("**/*.py") if path.parent != ROOT) + sorted(
        (ROOT / "kernels").glob("**/*.py")  # `**` does not go through the symlink
    )


MODULES = sorted({path.relative_to(ROOT).as_posix() for path in modules()})


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports; `from a import b` is `a.b`, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def violations(source: str, path: str) -> list[str]:
    """What is wrong with the imports of one module of the package, `path` relative to it."""
    part = path.split("/")[0]
    found = []
    for line, name in imported(ast.parse(source), "megatron_ext." + path.removesuffix(".py").replace("/", ".")):
        top, _, rest = name.partition(".")
        if top == "deepspeed" and part not in USES_DEEPSPEED:
            found.append(f"{path}:{line} imports {name}; only {', '.join(sorted(USES_DEEPSPEED))} may")
        if top != "megatron_ext" or part == "cli":
            continue
        other = rest.split(".")[0]
        if other == "__version__" or other == part:
            continue
        if other not in ROW_OF:
            found.append(f"{path}:{line} imports {name}, the public face, from inside: name the part it comes from")
        elif ROW_OF[other] <= ROW_OF[part]:
            found.append(f"{path}:{line} imports {name}; {part} may import only rows below its own")
    return found


def test_every_folder_of_the_package_has_a_row() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROW_OF)


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_down(path: str) -> None:
    assert violations((ROOT / path).read_text(), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layers/mlp.py", "from megatron_ext.pipeline import executor"),
        ("layers/mlp.py", "from megatron_ext.optimizer.adamw import AdamW"),
        ("layers/mlp.py", "def f():\n    import megatron_ext.engine"),
        ("layers/mlp.py", "from megatron_ext import engine"),
        ("layers/mlp.py", "from ..engine import step"),
        ("layers/mlp.py", "importlib.import_module('megatron_ext.engine.step')"),
        ("layers/mlp.py", "from megatron_ext import initialize"),
        ("layers/mlp.py", "import deepspeed.comm"),
        ("kernels/cpu/library.py", "from megatron_ext.config.errors import UserError"),
    ],
)
def test_the_rule_bites(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize("path", MODULES)
def test_every_module_says_what_it_is(path: str) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


def test_every_folder_says_what_it_is() -> None:
    """By the docstring of its `__init__.py`; `kernels` has none, for the name belongs to another project as well."""
    folders = {ROOT / path for path in MODULES}
    without = {folder.parent for folder in folders if not (folder.parent / "__init__.py").exists()}
    assert {folder.relative_to(ROOT).parts[0] for folder in without} <= {"kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_package_imports_nothing_optional_and_no_deepspeed() -> None:
    code = "import sys, megatron_ext; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, text=True, capture_output=True, check=True)
    assert set(done.stdout.split()) & {"triton", "apex", "transformers", "deepspeed"} == set()
    assert "megatron_ext" in done.stdout.split()
