"""The packages of the library stand in an order, import downward only, and know no lab by name."""

import ast
import re
from pathlib import Path

import pytest

import shardlab

ROOT = Path(shardlab.__file__).parent
ORDER = [
    *"errors pages progress hardware findings switch labs".split(),
    *"data zero run cluster sandbox milestones grading show course doctor cli".split(),
]
"""From the ground up; `docs/architecture.md` says what each is about."""


def imported(path: Path) -> set[str]:
    """The course's own packages that a file imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("shardlab.") and name.split(".")[1] in ORDER}


def test_the_order_has_every_package_once():
    here = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"}
    assert here == set(ORDER) and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_what_is_below_it(package):
    files = [ROOT / f"{package}.py"] if (ROOT / f"{package}.py").exists() else sorted((ROOT / package).glob("*.py"))
    above = set(ORDER[ORDER.index(package) + 1 :])
    assert {f"{path.name} imports {name}" for path in files for name in imported(path) & above} == set()


def test_the_library_names_no_lab():
    """A lab is two folders; what the library knows of it comes from `lab.toml`."""
    named = re.compile(r"lab0[0-9]|labs? 0[0-9]|task \"[0-9]", re.IGNORECASE)
    files = [path for path in ROOT.rglob("*") if path.suffix in (".py", ".md", ".html") and "shipped" not in path.parts]
    assert [f"{path.name}: {line}" for path in files for line in path.read_text().splitlines() if named.search(line)] == []
