"""The kinds of value a setting can have, and the base of the sections that hold them."""

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from train.config.yaml12 import AmbiguousText, shown

# Strict, because pydantic would otherwise take "32" for 32, 1 for true and 2.0 for 2.
Flag = StrictBool
Whole = Annotated[StrictInt, Field(ge=0)]
Count = Annotated[StrictInt, Field(ge=1)]
AtLeastZero = Annotated[StrictFloat, Field(ge=0)]
Positive = Annotated[StrictFloat, Field(gt=0)]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]
LessThanOne = Annotated[StrictFloat, Field(ge=0, lt=1)]
SomeShare = Annotated[StrictFloat, Field(gt=0, le=1)]
InnerShare = Annotated[StrictFloat, Field(gt=0, lt=1)]
Beta = Annotated[StrictFloat, Field(ge=0, lt=1)]
# Beyond 2 the hue shift (a quarter of the strength) would leave its range of -0.5..0.5.
JitterStrength = Annotated[StrictFloat, Field(ge=0, le=2)]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", json_schema_extra={"allowed": "a name"})]
Place = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", json_schema_extra={"allowed": "a path"})]
FolderName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$",
        json_schema_extra={"allowed": "a folder name of letters, digits, . _ - (not starting with . or -)"},
    ),
]


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the first of [{pair[0]}, {pair[1]}] is the greater; write [low, high]")
    return pair


def _certain(value: Any) -> Any:
    if isinstance(value, AmbiguousText):
        raise ValueError(
            f"{shown(value)} reads differently from one YAML to the next; write decimal digits, true or false, "
            f'or quote it as text: "{shown(value)}"'
        )
    return value


ShareRange = Annotated[tuple[SomeShare, SomeShare], AfterValidator(_in_order)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_in_order)]
PerGlobal = Share | tuple[Share, ...]
Scalar = Annotated[StrictBool | StrictInt | StrictFloat | str | None, BeforeValidator(_certain)]

# The keys a rule is about, the one to report it at first, and what is wrong.
BrokenRule = tuple[tuple[str, ...], str]


class Section(BaseModel):
    """A frozen group of keys; `rules` says what must hold between them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def rules(self) -> Iterator[BrokenRule]:
        """Every rule between keys that does not hold; keys are named from this section on."""
        return iter(())

    def broken_rules(self) -> Iterator[BrokenRule]:
        """Those of this section and of the sections in it."""
        yield from self.rules()
        for name in type(self).model_fields:
            if isinstance(section := getattr(self, name), Section):
                for keys, text in section.broken_rules():
                    yield tuple(f"{name}.{key}" for key in keys), text


class RuledSection(Section):
    """The root section. It alone asks for the rules, so that one pass over sound values finds every broken one."""

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        broken: list[InitErrorDetails] = [
            {
                "type": PydanticCustomError("rule", "{text}", {"text": text, "keys": [k.split(".") for k in keys]}),
                "loc": tuple(keys[0].split(".")),
                "input": None,
            }
            for keys, text in self.broken_rules()
        ]
        if broken:
            raise ValidationError.from_exception_data(type(self).__name__, broken)
        return self
