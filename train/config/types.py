"""The types of settings, and the base class of their sections."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from train.config.yaml12 import AmbiguousText, shown

# Strict, because pydantic would otherwise take "32" for 32, 1 for true and 2.0 for 2.
NonNegativeInt = Annotated[StrictInt, Field(ge=0)]
PositiveInt = Annotated[StrictInt, Field(ge=1)]
NonNegativeFloat = Annotated[StrictFloat, Field(ge=0)]
PositiveFloat = Annotated[StrictFloat, Field(gt=0)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
FractionBelowOne = Annotated[StrictFloat, Field(ge=0, lt=1)]
PositiveFraction = Annotated[StrictFloat, Field(gt=0, le=1)]
OpenFraction = Annotated[StrictFloat, Field(gt=0, lt=1)]
# Beyond 2 the hue shift (a quarter of the strength) would leave its range of -0.5..0.5.
JitterStrength = Annotated[StrictFloat, Field(ge=0, le=2)]
_NO_CONTROL_CHARACTERS = r"^[^\x00-\x1f\x7f]+$"
Name = Annotated[str, Field(pattern=_NO_CONTROL_CHARACTERS, json_schema_extra={"allowed": "a name"})]
PathText = Annotated[str, Field(pattern=_NO_CONTROL_CHARACTERS, json_schema_extra={"allowed": "a path"})]
_FOLDER_NAME = "a folder name of letters, digits, . _ - (not starting with . or -)"
FolderName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$", json_schema_extra={"allowed": _FOLDER_NAME})
]


def _check_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"[{pair[0]}, {pair[1]}] is in the wrong order; write [low, high]")
    return pair


def _refuse_ambiguous(value: Any) -> Any:
    if isinstance(value, AmbiguousText):
        text = shown(value)
        raise ValueError(f'{text} is ambiguous in YAML; write decimal digits, true or false, or quote it: "{text}"')
    return value


FractionRange = Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(_check_order)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_check_order)]
PerGlobalCrop = Fraction | tuple[Fraction, ...]
Scalar = Annotated[StrictBool | StrictInt | StrictFloat | str | None, BeforeValidator(_refuse_ambiguous)]

# The keys a rule is about, the one to report it at first, and the message.
BrokenRule = tuple[tuple[str, ...], str]


class Section(BaseModel):
    """A frozen group of keys; `rules` says what must hold between them. `load_config` checks the rules, pydantic does not."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def rules(self) -> Iterable[BrokenRule]:
        """The broken rules of this section; keys are named from this section on."""
        return ()

    def broken_rules(self) -> Iterator[BrokenRule]:
        """Those of this section and of the sections in it."""
        yield from self.rules()
        for name, section in self:
            if isinstance(section, Section):
                for keys, text in section.broken_rules():
                    yield tuple(f"{name}.{key}" for key in keys), text
