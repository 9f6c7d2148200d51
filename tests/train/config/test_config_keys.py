"""Every key of the config has an effect."""

import ast
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from pipeline.crops import augment
from train.config import schema
from train.config.schema import Config

TRAIN = Path(__file__).parents[3] / "train"


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, attribute name) of every value."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, name


def attributes_read() -> set[str]:
    """Return every attribute name that train/ reads outside the files that define the config.

    `pipeline/crops/augment.py` counts as well: it reads the keys of `data.augmentation`, which it gets as one object.
    """
    names = set()
    for path in (*TRAIN.rglob("*.py"), Path(augment.__file__)):
        if path.parent.name != "config":
            names |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    return names


def test_config_and_pipeline_have_the_same_augmentation_defaults() -> None:
    assert augment.Augmentation() == augment.Augmentation(**schema.Augmentation().model_dump())


def test_every_key_is_read_somewhere() -> None:
    # Data.crop_counts reads `use_multicrop`; pin_memory is documented to have no effect.
    read_elsewhere = {"use_multicrop", "pin_memory"}
    # Passed on as a whole, as arguments of the same names, of which Python refuses those that are not read.
    read_elsewhere |= {*schema.MultiCrop.model_fields, *schema.Masking.model_fields}
    read = attributes_read()
    assert {"crop_counts", "multicrop", "masking"} <= read
    assert [key for key, name in keys(Config) if name not in read | read_elsewhere] == []
