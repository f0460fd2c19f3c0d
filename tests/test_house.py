"""The floors of the house: no file imports from a floor above its own, and packaging knows every package."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "esper.graph": 1,
    "esper.runtime": 1,
    "esper.growth": 2,
    "esper.attention": 2,
    "esper.hosts": 3,
    "envs": 3,
    "esper.tamiyo": 3,
    "esper.growing": 4,
    "esper.simic": 4,
    "trainers": 5,
}
FILES = sorted(path for folder in ("esper", "envs", "trainers") for path in (ROOT / folder).rglob("*.py"))


def floor(module: str) -> int | None:
    found = [level for name, level in FLOORS.items() if module == name or module.startswith(f"{name}.")]
    return found[0] if found else None


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down(path):
    own = floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imported(path):
        above = floor(module)
        assert own is None or above is None or above <= own, f"{path} (floor {own}) imports {module} (floor {above})"


def test_every_package_is_packaged():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES if path.name == "__init__.py"}
    assert listed == there | {"esper.conf"}


def test_public_classes_have_docstrings():
    missing = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            public = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not missing
