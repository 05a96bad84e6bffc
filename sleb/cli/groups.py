"""Options that a command takes as one parameter: made from the fields of a record, or listed in a class of their own.

A command whose parameter is `Annotated[RunOptions, FieldOptions(RunSpec)]` has one option for each field of `RunSpec`
that describes one, and receives those that were given, by name. One whose parameter is a dataclass has an option or
argument for each field of it, and receives the dataclass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel

from sleb.formats import spelling
from sleb.records.options import EXECUTION, Setting, settings_of


@dataclass(frozen=True)
class FieldOptions:
    """The options that the fields of a record describe."""

    record: type[BaseModel]
    search: bool = True
    """Whether those that only a search has are among them."""
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What a command says of some of them in another way: attributes of `Option`, by name of the option. Where another
    default is put in words (`otherwise`), an option that is not given is left out."""

    def settings(self) -> tuple[Setting, ...]:
        """The descriptions of the options, with the changes."""
        return tuple(
            replace(
                each,
                option=replace(each.option, **changed),
                default=None if "otherwise" in changed else each.default,
            )
            for each in settings_of(self.record, search=self.search)
            for changed in (self.changes.get(each.name, {}),)
        )


def field_option(record: type[BaseModel], name: str) -> Any:
    """The typer option of one field, for a command that takes few of them."""
    return _typer_option(next(each for each in settings_of(record) if each.name == name))


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a parameter for each option of its groups, as typer reads it from the signature."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, list[inspect.Parameter]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        own = list(_expanded(hint))
        if own:
            groups[name] = own
        parameters += own or [parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)]

    @wraps(command)
    def with_groups(**values: Any) -> None:
        gathered = {
            name: _gathered(hints[name], {each.name: values.pop(each.name) for each in own})
            for name, own in groups.items()
        }
        command(**values, **gathered)

    with_groups.__signature__ = inspect.Signature(_in_order(parameters))  # type: ignore[attr-defined]
    with_groups.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_groups


def _in_order(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """Options panel by panel, in the order in which the panels first appear, but how a job is executed comes last."""
    panels = [getattr(get_args(each.annotation)[-1], "rich_help_panel", None) or "" for each in parameters]
    ranks = [(panel == EXECUTION, panels.index(panel)) for panel in panels]
    return [parameters[place] for place in sorted(range(len(parameters)), key=ranks.__getitem__)]


def _field_options(hint: Any) -> FieldOptions | None:
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((each for each in marks if isinstance(each, FieldOptions)), None)


def _expanded(hint: Any) -> Iterator[inspect.Parameter]:
    """The parameters of a group; none for what is not a group."""
    kind = inspect.Parameter.KEYWORD_ONLY
    if (options := _field_options(hint)) is not None:
        for setting in options.settings():
            annotation: Any = Annotated.__class_getitem__((_typer_type(setting), _typer_option(setting)))  # type: ignore[attr-defined]
            yield inspect.Parameter(setting.name, kind, annotation=annotation, default=_typer_default(setting))
    elif is_dataclass(hint):
        own = get_type_hints(hint, include_extras=True)
        for each in fields(hint):
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            yield inspect.Parameter(each.name, kind, annotation=own[each.name], default=default)


def _gathered(hint: Any, values: dict[str, Any]) -> Any:
    """What the command receives for a group."""
    options = _field_options(hint)
    if options is None:
        return hint(**values)
    settings = {each.name: each for each in options.settings()}
    return {name: _value(settings[name], value) for name, value in values.items() if value is not None}


def _value(setting: Setting, value: Any) -> Any:
    if setting.kind == "check" and setting.on_off is not None:
        return setting.on_off[0] if value else setting.on_off[1]
    return spelling.read(setting, value) if isinstance(value, str) else value


def _typer_type(setting: Setting) -> Any:
    if setting.kind == "check":
        return bool
    plain = setting.type if setting.kind in ("choice", "number") else str
    return plain | None if setting.depends else plain


def _typer_default(setting: Setting) -> Any:
    if setting.kind == "check" and setting.on_off is not None:
        return setting.default == setting.on_off[0]
    return None if setting.depends else setting.default


def _typer_option(setting: Setting) -> Any:
    option = setting.option
    flag = (setting.flag,)
    if setting.kind == "check" and _typer_default(setting):
        flag = (f"{setting.flag}/{setting.flag.replace('--', '--no-', 1)}",)
    return typer.Option(
        *flag,
        min=None if setting.low is None or setting.type is not int or setting.kind != "number" else int(setting.low),
        metavar=option.metavar,
        rich_help_panel=option.group,
        help=f"{option.help} [default: {words}]" if (words := _default_to_say(setting)) else option.help,
    )


def _default_to_say(setting: Setting) -> str:
    """The default in words, where typer does not know it."""
    return setting.default_in_words if setting.depends else ""
