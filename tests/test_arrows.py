"""The folders import each other only along the arrows of the design."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "pipeline": {"pipeline"},
    "model": {"model"},
    "train": {"pipeline", "model", "train"},
    "tools": {"pipeline", "model", "train", "tools"},
}


def imported_folders(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names & MAY_IMPORT.keys()


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_a_folder_imports_only_what_the_design_allows(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {path.name: imported_folders(path) - MAY_IMPORT[folder] for path in files}
    assert not {name: extra for name, extra in wrong.items() if extra}


def test_nothing_is_ever_unpickled() -> None:
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "torch.load",
                    "pickle.load",
                    "pickle.loads",
                ):
                    pytest.fail(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")
