"""What a field of a spec is as an option: one description, from which every edge makes its own. Knows no edge.

The command line, the dashboard's form, the command shown for a run, the functions of a notebook and
`docs/command-line.md` are all made from the fields of `RunSpec` and of jobs. Name, type, default and range are the
field's own; `Option` says the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sleb.records.base import MOST

Kind = Literal["check", "choice", "number", "text", "blocks", "rise", "size"]
"""How a value is typed: `blocks` as `0,29` or `8-20`, a `rise` as `+10%`, a `size` as `24GB`."""
TEXT, BLOCKS, EXECUTION = "Which text", "Which blocks", "How"
GROUPS = (TEXT, BLOCKS, EXECUTION)
"""Groups of options, in the order in which they are shown."""


@dataclass(frozen=True)
class Option:
    """How a field is offered, beside the name, type, default and range that it has anyway."""

    label: str
    """Name on a screen, a few words."""
    help: str
    """One or two sentences for every edge; the default and the range are added where it is shown."""
    group: str
    name: str = ""
    """Parameter of a notebook, and flag of the command line, where the field is called otherwise."""
    details: str = ""
    """More sentences, where there is room: in the form and in the reference."""
    metavar: str | None = None
    """An example of what is typed, or a word for it."""
    unit: str = ""
    """What a number counts. `rise` and `bytes` are typed in a way of their own."""
    usual: Any = None
    """The default that stands for None, where that depends on other options."""
    demo: Any = None
    """The default for the demo model, where that is another one."""
    otherwise: str = ""
    """The default in words, where the field says None."""
    percent: tuple[int, int] | None = None
    """The range that a form offers for a share, in per cent."""
    on_off: tuple[str, str] | None = None
    """Two values that a form offers as a check."""
    flag: bool = False
    """Whether the command line, too, offers `on_off` as a flag."""
    methods: tuple[str, ...] = ()
    """The search methods that take it; all, where none is named."""
    search_only: bool = False
    """Whether an analysis without a search does not have it."""
    in_form: bool = True
    """Whether the dashboard's form offers it."""


@dataclass(frozen=True)
class Setting:
    """An option with what its field says about it."""

    option: Option
    path: tuple[str, ...]
    """Fields from the record to the value: ("calibration", "sequences")."""
    type: Any
    """Type of a value that is given."""
    default: Any
    low: float | None = None
    high: float | None = None
    strict: bool = False
    """Whether the ends of the range are left out of it."""

    @property
    def name(self) -> str:
        """The parameter in a notebook."""
        return self.option.name or self.path[-1]

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def kind(self) -> Kind:
        """How a value is typed."""
        if self.type is bool or self.option.flag:
            return "check"
        if get_origin(self.type) is tuple:
            return "blocks"
        if self.option.unit in ("rise", "bytes"):
            return "rise" if self.option.unit == "rise" else "size"
        if self.choices:
            return "choice"
        return "number" if self.type in (int, float) else "text"

    @property
    def choices(self) -> tuple[str, ...]:
        """All values, where they can be listed."""
        if get_origin(self.type) is Literal:
            return get_args(self.type)
        return tuple(each.value for each in getattr(self.type, "__members__", {}).values())

    @property
    def on_off(self) -> tuple[Any, Any] | None:
        """The values that a check stands for."""
        return (True, False) if self.type is bool else self.option.on_off

    @property
    def depends(self) -> bool:
        """Whether the default follows from the model or from other options, so that None stands for it."""
        return self.default is None or self.option.demo is not None

    def usual(self, demo: bool = False) -> Any:
        """The value that is meant where none is given."""
        if demo and self.option.demo is not None:
            return self.option.demo
        return self.default if self.option.usual is None else self.option.usual

    @property
    def default_in_words(self) -> str:
        """The default, as a table or a help text says it; empty where there is none."""
        if self.option.otherwise:
            return self.option.otherwise
        usual = self.usual()
        if usual is None:
            return ""
        words = str(getattr(usual, "value", usual))
        return words if self.option.demo is None else f"{words}; {self.option.demo} for demo"

    def value_in(self, record: BaseModel) -> Any:
        """The value of the option in a record of this type."""
        value: Any = record
        for name in self.path:
            value = getattr(value, name)
        return value


@cache
def settings_of(record: type[BaseModel], *, search: bool = True) -> tuple[Setting, ...]:
    """The options that a record describes, group by group; without those of a search where none is wanted."""
    settings = sorted(_settings(record, ()), key=lambda each: GROUPS.index(each.option.group))
    return tuple(each for each in settings if search or not each.option.search_only)


def _settings(record: type[BaseModel], path: tuple[str, ...]) -> Iterator[Setting]:
    for name, field in record.model_fields.items():
        option = next((each for each in field.metadata if isinstance(each, Option)), None)
        if option is not None:
            yield _setting(option, (*path, name), field)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, (*path, name))


def _setting(option: Option, path: tuple[str, ...], field: FieldInfo) -> Setting:
    plain, marks = _without_marks(field.annotation)
    marks = [*field.metadata, *marks]
    low = next((mark.ge if isinstance(mark, Ge) else mark.gt for mark in marks if isinstance(mark, Ge | Gt)), None)
    high = next((mark.le if isinstance(mark, Le) else mark.lt for mark in marks if isinstance(mark, Le | Lt)), None)
    return Setting(
        option=option,
        path=path,
        type=plain,
        default=field.default,
        low=low,  # type: ignore[arg-type]
        high=None if high is None or high >= MOST else high,  # type: ignore[operator, arg-type]
        strict=any(isinstance(mark, Gt) for mark in marks),
    )


def _without_marks(annotation: Any) -> tuple[Any, list[Any]]:
    """The type that an annotation has besides None, and its metadata."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        plain, more = _without_marks(inner)
        return plain, [*more, *(each for mark in marks for each in getattr(mark, "metadata", (mark,)))]
    if get_origin(annotation) in (Union, UnionType):
        (inner,) = (each for each in get_args(annotation) if each is not NoneType)
        return _without_marks(inner)
    return annotation, []
