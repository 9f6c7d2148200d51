"""Modules import each other only as the design allows, never in a circle, and commands start fast."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "model", "train", "tools")
# The packages and modules of the project that the modules of a package can import. The longest entry that contains a module
# applies to it.
MAY_IMPORT = {
    "pipeline": {"pipeline"},
    "pipeline.shards": {"pipeline.shards", "pipeline.files", "pipeline.lock", "pipeline.text", "pipeline.defaults"},
    "pipeline.crops": {
        "pipeline.crops",
        "pipeline.shards",
        "pipeline.order",
        "pipeline.defaults",
        "pipeline.files",
        "pipeline.text",
    },
    "model": {"model"},
    "train": {"pipeline", "model", "train"},
    "train.config": {"train.config", "train.command", "pipeline.defaults", "pipeline.text", "pipeline.files", "model.defaults"},
    "tools": {"pipeline", "model", "train", "tools"},
    "tools.shards": {"pipeline", "tools.shards", "tools.own_process", "train.command", "train.output.display"},
}


# `--help` and errors in a config must not wait for what these import later.
COMMANDS = ("train.run", "train.evaluate", "train.config.load", "tools.make_shards", "tools.doctor", "tools.bench")
COMMANDS += ("tools.study", "tools.preview", "tools.export", "tools.compare_runs", "tools.embed")
SLOW_PACKAGES = ("torch", "nvidia.dali", "timm", "matplotlib", "numba", "scipy")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def imports(path: Path, always: bool = False) -> set[str]:
    """Return the project modules that `path` imports; with `always`, without imports in functions and for type checking."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in statements_at_import(tree) if always else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return modules & MODULES.keys()


def statements_at_import(tree: ast.Module) -> list[ast.stmt]:
    """Return the statements that run when the module is imported."""
    statements, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        statements.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            waiting += node.body + node.orelse
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            waiting += node.body
    return statements


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_only_what_the_design_allows(package: str) -> None:
    wrong = []
    for module, path in MODULES.items():
        if max((entry for entry in MAY_IMPORT if inside(module, entry)), key=len) == package:
            wrong += [
                f"{module} imports {name}"
                for name in sorted(imports(path))
                if not any(inside(name, allowed) for allowed in MAY_IMPORT[package])
            ]
    assert any(inside(module, package) for module in MODULES)
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imports(path, always=True) - {module} for module, path in MODULES.items()}
    assert sum(map(len, graph.values())) > len(MODULES)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_nothing_is_ever_unpickled() -> None:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                pytest.fail(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")


def test_commands_import_nothing_slow_before_their_arguments_and_config_are_checked() -> None:
    code = f"import sys, {', '.join(COMMANDS)}; print(*sorted(sys.modules.keys() & set({SLOW_PACKAGES})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
