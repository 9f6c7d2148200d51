"""The graph of a GPU can be defined on a machine that has none: DALI checks devices and names of arguments at that time."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import Pipeline

from pipeline.crops.augment import ViewRecipe
from pipeline.crops.graph import ReaderOptions, define_graph
from train.build import build_dataset
from train.config.load import load_config

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
OPERATIONS = ("jitter_prob", "gray_prob", "blur_prob", "solarize_prob")
CROPPED_ON = {"gpu": {"mixed"}, "dali": {"mixed"}, "cpu": {"cpu"}}  # DALI's name for the decoder


def nothing() -> np.ndarray:
    raise StopIteration


def defined(recipes: tuple[ViewRecipe, ...], crop_device: str) -> Pipeline:
    reader = ReaderOptions("gpu", crop_device=crop_device)
    graph = define_graph(["000000.tar"], ["000000.idx"], nothing, recipes, 4, reader)
    graph._build_graph()
    return graph


def operators(graph: Pipeline, name: str) -> list[str]:
    """The devices of the operators of this name."""
    return [node._op.device for node in graph._ops if type(node._op).__name__ == name]


@pytest.mark.parametrize("crop_device", CROPPED_ON)
@pytest.mark.parametrize("used", list(product((0.0, 0.5), repeat=len(OPERATIONS))), ids=str)
def test_any_operations_make_a_legal_graph(used: tuple[float, ...], crop_device: str) -> None:
    recipe = ViewRecipe(32, (0.1, 1.0), **dict(zip(OPERATIONS, used, strict=True)))
    graph = defined((recipe, recipe), crop_device)
    # For the kernel: images, and the parameters for the host.
    assert [output.device for output in graph._graph_outputs] == ["gpu", "cpu" if crop_device == "gpu" else "gpu"]


@pytest.mark.parametrize("crop_device", CROPPED_ON)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_shipped_config_makes_a_legal_graph(config: Path, crop_device: str, data_path: Path) -> None:
    recipes = build_dataset(load_config(config, [f"data.data_path={data_path}", "data.dataset=custom"])).recipes
    graph = defined(recipes, crop_device)
    assert [output.device for output in graph._graph_outputs] == (
        ["gpu", "cpu"] if crop_device == "gpu" else ["gpu"] * len(recipes)
    )
    assert set(operators(graph, "Image")) == CROPPED_ON[crop_device]


ALL = ViewRecipe(32, (0.1, 1.0), jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, solarize_prob=0.5)


def test_no_operator_launches_a_kernel_for_each_sample() -> None:
    """On a GPU color_space_conversion does."""
    graph = defined((ALL,), "dali")
    assert operators(graph, "BrightnessContrast") == ["gpu", "gpu"]
    assert operators(graph, "ColorSpaceConversion") == []


@pytest.mark.parametrize(("crop_device", "count"), [("gpu", 0), ("dali", 1)])
def test_all_small_arrays_of_a_batch_are_uploaded_at_once(crop_device: str, count: int) -> None:
    """DALI waits for its stream at every upload."""
    graph = defined((ALL,) * 8, crop_device)
    inputs = [node for op in graph._ops for node in op._inputs if (node.device, node.source._op.device) == ("gpu", "cpu")]
    assert len({node.name for node in inputs}) == count


@pytest.mark.parametrize("reader", [("cpu", "gpu"), ("gpu", "tpu"), ("cuda", "cpu")])
def test_devices_that_cannot_be_are_refused(reader: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{reader[1]}|{reader[0]}"):
        ReaderOptions(device=reader[0], crop_device=reader[1])
