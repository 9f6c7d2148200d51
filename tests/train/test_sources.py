"""The sources never read anything that could run code."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("pipeline", "model", "train", "tools")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The object collectives of torch.distributed pickle too, and TorchScript and torch.package archives hold pickles.
CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "yaml.load", "yaml.unsafe_load"}
OBJECT_COLLECTIVES = ("gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list")


def unsafe(tree: ast.AST) -> list[str]:
    """Every import or call in a source that unpickles."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name == "load"]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            loads = name.endswith((".load", ".read_pickle")) and any(
                word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords
            )
            if name in CALLS or name.endswith(OBJECT_COLLECTIVES) or loads:
                found.append(name)
    return found


def test_nothing_in_the_sources_unpickles() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if (names := unsafe(ast.parse(path.read_text())))
    }
    assert found == {}


def test_the_walk_notices_each_way_to_unpickle() -> None:
    text = """
import pickle
from dill import loads
from torch import load
torch.load(path)
np.load(path, allow_pickle=True)
dist.broadcast_object_list(things)
yaml.load(text, Loader)
np.load(path, allow_pickle=False)
json.load(file)
"""
    assert sorted(unsafe(ast.parse(text))) == sorted(
        ["pickle", "dill", "torch.load", "torch.load", "np.load", "dist.broadcast_object_list", "yaml.load"]
    )
