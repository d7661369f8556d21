"""Imports go one way. Read from the source with `ast`, so that an import inside a function counts.

`test_the_check_itself_can_fail` plants one violation of every rule.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# An import goes from a later layer to an earlier one, or stays inside a layer.
LAYERS = (
    {"types", "errors", "info", "embedded", "plugins"},
    {"adapters"},
    {"plan"},
    {"engine"},
    {"metrics"},
    {"store"},
    {"report"},
    {
        "tracer",
        "planner",
        "forecast",
        "kernels_used",
        "rows",
        "recording",
        "requested",
        "pictures",
        "edit",
        "attribution",
        "testing",
        "demo",
        "profile",
        "__init__",
    },
    {"cli"},
    {"__main__"},
)
KNOWS_NOTHING_OF_OURS = {"types", "errors"}
NEVER_IMPORTED = {"cli", "bench", "tests", "recipe"}


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute dotted names of everything that `source`, a module in `package`, imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*base, node.module or ""]).strip(".") if node.level else node.module
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str, parts: set[str]) -> str | None:
    """Which part of fasttrace a dotted name lies in; its root is "__init__". None is not
    ours, or the version, which everyone may know."""
    first, *rest = module.split(".")
    if first != "fasttrace" or rest == ["__version__"]:
        return None
    return rest[0] if rest and rest[0] in parts else "__init__"


def violations(files: dict[str, str]) -> list[str]:
    """files: path below the repository -> source. Sentences, one a violation."""
    ours = {path: source for path, source in files.items() if path.startswith("fasttrace/")}
    names = {path: Path(path).parts[1].removesuffix(".py") for path in ours}
    parts = set(names.values())
    rank = {part: position for position, layer in enumerate(LAYERS) for part in layer}
    found = [f"{part} is in no layer of LAYERS" for part in sorted(parts - rank.keys())]
    reach: dict[str, set[str]] = {part: set() for part in parts}
    for path, source in ours.items():
        here = names[path]
        for module in sorted(imported_modules(source, ".".join(Path(path).parts[:-1]))):
            there = part_of(module, parts)
            if module.split(".")[0] in NEVER_IMPORTED | {"kernels"}:
                found.append(f"{path} imports {module}")
            if there is None or there == here:
                continue
            reach[here].add(there)
            never = NEVER_IMPORTED - ({"cli"} if here == "__main__" else set())
            if here in KNOWS_NOTHING_OF_OURS or there in never:
                found.append(f"{path} imports {module}")
            elif rank.get(there, 0) > rank.get(here, len(LAYERS)):
                found.append(f"{path} imports {module}, which comes after it")
    if "engine" in reachable("report", reach):
        found.append("report reaches engine")
    for path in files:
        if path.startswith("kernels/fasttrace_kernels/"):
            modules = imported_modules(files[path], "fasttrace_kernels")
            found += [f"{path} imports {m}" for m in modules if m.split(".")[0] == "fasttrace"]
        if path in {"kernels/__init__.py", "tests/__init__.py", "bench/__init__.py"}:
            found.append(f"{path} makes its folder a package")
    return found


def reachable(start: str, reach: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for part in reach.get(waiting.pop(), set()) - seen:
            seen.add(part)
            waiting.append(part)
    return seen


def read(*folders: str) -> dict[str, str]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def test_imports_go_one_way():
    files = read("fasttrace", "kernels", "tests", "bench")
    assert "fasttrace/types.py" in files
    assert violations(files) == []


PLANTED = {
    "later layer": ("fasttrace/plan/a.py", "from fasttrace.engine import b", "comes after it"),
    "in a function": ("fasttrace/plan/a.py", "def f():\n    import fasttrace.store", "comes after"),
    "relative": ("fasttrace/plan/a.py", "from ..report import page", "comes after it"),
    "root": ("fasttrace/store/a.py", "from fasttrace import Tracer", "comes after it"),
    "types": ("fasttrace/types.py", "from fasttrace.errors import UsageError", "types.py imports"),
    "cli": ("fasttrace/tracer.py", "import fasttrace.cli", "imports fasttrace.cli"),
    "tests": ("fasttrace/cli/a.py", "from tests.helpers import b", "imports tests"),
    "report to engine": (
        "fasttrace/report/a.py",
        "import fasttrace.engine",
        "report reaches engine",
    ),
    "kernels": (
        "kernels/fasttrace_kernels/a.py",
        "import fasttrace.types",
        "imports fasttrace.types",
    ),
    "package": ("kernels/__init__.py", "", "makes its folder a package"),
    "new part": ("fasttrace/novelty.py", "", "novelty is in no layer"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_check_itself_can_fail(name):
    path, source, expected = PLANTED[name]
    clean = {
        f"fasttrace/{part}.py": ""
        for part in ("types", "errors", "plan", "engine", "store", "report", "tracer", "cli")
    }
    assert violations(clean) == []
    found = violations(clean | {path: source})
    assert [sentence for sentence in found if expected in sentence]


def test_report_reaches_engine_through_others():
    files = {
        "fasttrace/engine.py": "",
        "fasttrace/store.py": "from fasttrace.engine import run",
        "fasttrace/report.py": "from fasttrace.store import read",
    }
    assert violations(files) == ["report reaches engine"]
