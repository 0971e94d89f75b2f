"""The floors: no import goes up, none goes in a circle, and `import coembed` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import coembed

ROOT = Path(coembed.__file__).parent
BASE = {"errors", "files"}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "data": BASE,
    "nn": BASE | {"data"},
    "train": BASE | {"data", "nn"},
    "models": BASE | {"data", "nn", "train"},
    "explain": BASE | {"data", "nn", "train", "models"},
    "metrics": {"errors"},
    "study": BASE | {"data", "models", "metrics"},
    "report": BASE | {"data", "models", "metrics", "study"},
    "workflow": BASE | {"data", "models", "metrics", "study", "report"},
    "cli": BASE | {"data", "models", "explain", "metrics", "study", "report", "workflow"},
}
"""Floor -> the floors it may import besides itself. `workflow` serves the command line."""
HEAVY = {"torch", "scanpy", "anndata", "mudata", "sklearn", "umap", "matplotlib", "igraph", "scipy",
         "numpy", "pandas", "pydantic", "lightning_fabric"}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from run_nodes(other)
            continue
        yield node
        yield from run_nodes(node)


def imports(name: str) -> set[str]:
    """Modules of coembed that a module imports, anywhere in it but for type checking alone."""
    found = set()
    for node in run_nodes(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            of_names = {module for module in inner if module in MODULES}
            found |= of_names or {str(node.module)}
    return {module for module in found if module.split(".")[0] == "coembed"} - {name}


GRAPH = {name: imports(name) for name in MODULES}


def floor(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_the_parser_sees_imports_wherever_they_are() -> None:
    assert "coembed.errors" in GRAPH["coembed.data.pipeline"]
    assert "coembed.train.loop" in GRAPH["coembed.models.base"]
    assert "coembed.models.saving" in GRAPH["coembed.models.base"], "inside a function"
    assert "coembed.models.base" not in GRAPH["coembed.models"], "for type checking alone"
    assert {floor(name) for name in MODULES} - {""} <= set(ALLOWED), "a floor without a rule"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "coembed"])
def test_no_import_goes_up(name: str) -> None:
    mine = floor(name)
    others = {module for module in GRAPH[name] if module != "coembed" and floor(module) != mine}
    wrong = {module for module in others if floor(module) not in ALLOWED[mine]}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_no_import_goes_in_a_circle() -> None:
    """Depth-first search; the root only looks names up when they are used."""
    graph = {name: sorted(GRAPH[name] - {"coembed"}) for name in GRAPH if name != "coembed"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for module in graph[name]:
                visit(module, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(graph)


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import coembed") & HEAVY


def test_model_names_are_known_without_loading_a_model() -> None:
    code = "import coembed.models\nassert coembed.models.model_names()"
    assert not loaded_by(code) & {"torch", "scanpy", "anndata", "sklearn"}


def test_names_of_the_package_are_there() -> None:
    for name in coembed.__all__:
        assert getattr(coembed, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coembed.nothing  # noqa: B018
