"""Field types of the `xtf:` block: numbers, paths, regexes, the drop rule and the reference.

Every check raises a `ValueError` whose text follows the value in the message, such as "is not a number";
`config/messages.py` adds key, value and legal values.
"""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictStr,
    Tag,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

# A union's branch is chosen by the value's type, so that pydantic reports the errors of that branch alone.
TAGS = TEXT, OTHER = "<text>", "<other>"
T = TypeVar("T")
_EXPONENT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)[eE][+-]?\d+")


class Problems(ValueError):
    """Values that are legal one by one but not together; each problem is (key below the model, value, why)."""

    def __init__(self, *problems: tuple[str, Any, str]) -> None:
        super().__init__("; ".join(f"{key} {why}" for key, _, why in problems))
        self.problems = problems


def _number(value: Any) -> float:
    if isinstance(value, str) and _EXPONENT.fullmatch(value):  # YAML 1.1 reads 1e-3 as text
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError("is not a number" + _but_text(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("is not a finite number")
    return number


def _but_text(value: Any) -> str:
    """What to add where text stands in place of a number."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ", but text"
    return ", but text; remove the quotes"


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError("is not a whole number")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError("is not a whole number of 64 bits")
    return int(value)


def _odd(value: Any) -> int:
    if value in ("sentence", "line"):
        raise ValueError(f"is a unit; write `unit: {value}` and leave `window` out")
    if _whole(value) % 2 == 0:
        raise ValueError("is even, so the window has no middle")
    return int(value)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError("is not a list" + ("; write [...] around it" if isinstance(value, str) else ""))
    return list(value)


def _path(value: Any) -> Any:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and "\0" in value:
        raise ValueError("holds a NUL character")
    return value


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a regular expression Python can compile ({error})") from error
    return pattern


def _once(values: list[T]) -> list[T]:
    if len(set(values)) < len(values):
        raise ValueError("names one of them twice")
    return values


def _words(words: list[str]) -> list[str]:
    if not all(word.strip() for word in words):
        raise ValueError("holds an empty word")
    return words


def _domain(value: str) -> str:
    """Read a word file at once: an error should come before any model is loaded."""
    if value == "dataset":
        return value
    path = Path(os.path.expanduser(value))
    read_words(path)
    return str(path)


def read_words(path: Path) -> list[str]:
    """Expert words of a file, one per line; blank lines and lines that begin with # are skipped. Raises ValueError."""
    try:
        if not path.is_file():
            raise ValueError(f"is not a file (a relative path starts at {Path.cwd()}); a single word is written [word]")
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not words:
        raise ValueError("holds no word; put one word on each line")
    return words


def _by_text(value: Any) -> str:
    return TEXT if isinstance(value, str | os.PathLike) else OTHER


N = TypeVar("N")
ByText = Annotated[Annotated[T, Tag(TEXT)] | Annotated[N, Tag(OTHER)], Discriminator(_by_text)]

Finite = Annotated[float, BeforeValidator(_number)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Probability = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
Quantile = Annotated[float, Field(gt=0, lt=1), BeforeValidator(_number)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Calibration = Annotated[int, Field(ge=8), BeforeValidator(_whole)]  # quartiles of fewer documents say nothing
Classes = Annotated[int, Field(ge=2, le=8), BeforeValidator(_whole)]
Window = Annotated[int, Field(ge=1, le=4095, json_schema_extra={"not": {"multipleOf": 2}}), BeforeValidator(_odd)]
Name = Annotated[StrictStr, Field(min_length=1), BeforeValidator(_path)]
PathText = Annotated[StrictStr, Field(min_length=1, json_schema_extra={"format": "path"}), BeforeValidator(_path)]
Pattern = Annotated[StrictStr, Field(min_length=1, json_schema_extra={"format": "regex"}), AfterValidator(_regex)]
Patterns = Annotated[list[Pattern], BeforeValidator(_listed)]
_SET = {"uniqueItems": True}
Layers = ByText[
    Literal["first", "middle", "last", "all"],
    Annotated[
        list[Whole], Field(min_length=1, json_schema_extra=_SET), AfterValidator(_once), BeforeValidator(_listed)
    ],
]
Columns = ByText[
    Name, Annotated[list[Name], Field(json_schema_extra=_SET), AfterValidator(_once), BeforeValidator(_listed)]
]
_DOMAIN_SCHEMA = {"anyOf": [{"const": "dataset"}, {"type": "string", "minLength": 1, "format": "file-path"}]}
Domain = ByText[
    Annotated[
        StrictStr, Field(min_length=1), AfterValidator(_domain), BeforeValidator(_path), WithJsonSchema(_DOMAIN_SCHEMA)
    ],
    Annotated[list[StrictStr], Field(min_length=1), AfterValidator(_words), BeforeValidator(_listed)],
]


class Block(BaseModel):
    """Base of every part of the block: unknown keys are refused, values cannot be reassigned."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _only_rules(schema: dict[str, Any], model: type[Drop]) -> None:
    """Express in JSON schema what `Drop` checks: one of the legal sets of keys, without null."""
    for field in schema["properties"].values():
        field.update(next((option for option in field.pop("anyOf", []) if option["type"] != "null"), {}))
        if field.get("default", ...) is None:
            del field["default"]
    schema["anyOf"] = [{"required": list(keys), "propertyNames": {"enum": list(keys)}} for keys in model.rules]


class Drop(Block):
    """Which scores are dropped: exactly one rule; null counts as absent."""

    model_config = ConfigDict(json_schema_extra=_only_rules)
    # the legal sets of keys
    rules: ClassVar[Sequence[Sequence[str]]] = (
        ("quantile",),
        ("below",),
        ("of_median",),
        ("fence",),
        ("cluster",),
        ("cluster", "of"),
    )
    quantile: Quantile | None = Field(default=None, description="Drop the lowest share of the scores.")
    below: Finite | None = Field(default=None, description="Drop scores below this, in the score's own unit.")
    of_median: Probability | None = Field(
        default=None, description="Drop scores below this share of the dataset's median score, which must be positive."
    )
    fence: NonNegative | None = Field(default=None, description="Drop scores below Q1 - fence * (Q3 - Q1), Eq. (5).")
    cluster: Positive | None = Field(default=None, description="Drop this Multi-Otsu class, Eq. (7); 1 is the lowest.")
    of: Classes = Field(default=5, description="Number of classes of the split; only beside `cluster`.")

    @model_validator(mode="after")
    def _one_rule(self) -> Drop:
        given = [key for key in sorted(self.model_fields_set) if getattr(self, key) is not None]
        if not any(given == sorted(rule) for rule in self.rules):
            raise ValueError(f"holds {' and '.join(given) or 'no rule'}; write exactly one rule")
        if self.cluster is not None and self.cluster > self.of:
            raise Problems(("cluster", self.cluster, f"is more than the {self.of} classes that `of` asks for"))
        return self

    @model_serializer(mode="plain")
    def _the_rule(self) -> dict[str, Any]:
        keys = max((rule for rule in self.rules if all(getattr(self, key) is not None for key in rule)), key=len)
        return {key: getattr(self, key) for key in keys}

    def __str__(self) -> str:
        """The rule as in YAML flow style, "{fence: 1.0}"."""
        return "{" + ", ".join(f"{key}: {value}" for key, value in self._the_rule().items()) + "}"

    def bounds(self) -> list[tuple[str, str, float]]:
        """Fixed thresholds of the rule, each as (key, "below" or "above", threshold in the score's unit)."""
        return [] if self.below is None else [("below", "below", self.below)]


class ReferenceConfig(Block):
    """The model that scores the tokens."""

    model: Name | None = Field(
        default=None, description="null: the model being trained, adapters off. Else a path or hub id, same vocabulary."
    )
    revision: Name | None = Field(default=None, description="Revision of a separate hub model; null: main.")
    quantization: Literal["nf4", "fp4", "int8", "none"] = Field(default="nf4", description="Of a separate model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Type of a separate model; auto: its own."
    )
    trust_remote_code: StrictBool = Field(default=False, description="Run code that comes with a separate model.")

    @model_validator(mode="after")
    def _separate_model_only(self) -> ReferenceConfig:
        fields = type(self).model_fields.items()
        changed = [name for name, field in fields if getattr(self, name) != field.default]
        if self.model is None and changed:
            why = "has no effect while reference.model is null (the model being trained, as it is loaded): "
            raise Problems(*[(name, getattr(self, name), why + "remove it, or name a model") for name in changed])
        return self
