"""No key of the config is without effect."""

import ast
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from pipeline.crops import augment
from train.config import schema
from train.config.schema import Config

TRAIN = Path(__file__).parents[3] / "train"


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, attribute name) of every leaf."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, name


def attributes_read() -> set[str]:
    """Every attribute name that train/ reads outside of the files that define the config.

    `data.augmentation` is handed on whole, so it is `pipeline/crops/augment.py` that reads its keys.
    """
    names = set()
    for path in (*TRAIN.rglob("*.py"), Path(augment.__file__)):
        if path.parent.name != "config":
            names |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    return names


def test_the_augmentation_of_the_config_is_that_of_the_pipeline() -> None:
    assert augment.Augmentation() == augment.Augmentation(**schema.Augmentation().model_dump())


def test_every_key_is_read_somewhere() -> None:
    # The first three reach the code through Data.crop_counts; pin_memory is documented to have no effect.
    through = {"num_global_crops", "num_local_crops", "use_multicrop", "pin_memory"}
    read = attributes_read()
    assert "crop_counts" in read
    assert [key for key, name in keys(Config) if name not in read | through] == []
