"""Options that may be abbreviated, as argparse allows: `--promp` for `--prompt`. Click takes only whole names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import typer
from typer.core import TyperCommand, TyperOption


class PrefixCommand(TyperCommand):
    """A command whose long options are known by any prefix that only one of them has."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        takes_value = {
            name: isinstance(option, TyperOption) and not option.is_flag
            for option in self.get_params(ctx)
            for name in option.opts
            if name.startswith("--")
        }
        try:
            return super().parse_args(ctx, list(expanded(args, takes_value)))
        except AmbiguousOptionError as error:
            raise typer.BadParameter(str(error), ctx) from None


class AmbiguousOptionError(ValueError): ...


def expanded(args: Sequence[str], takes_value: Mapping[str, bool]) -> Iterator[str]:
    """`args` with the whole names of the options. `takes_value`: by whole name; the argument after such an option is
    its value, whatever it looks like. A name that is no prefix of any option stays, for Click to refuse.

    Raises AmbiguousOptionError for a prefix of several options.
    """
    rest = iter(args)
    for arg in rest:
        if arg == "--" or not arg.startswith("--"):
            yield arg
            if arg == "--":
                yield from rest
            continue
        written, equals, value = arg.partition("=")
        name = whole_name(written, takes_value)
        yield f"{name}{equals}{value}"
        if takes_value.get(name) and not equals:
            yield from (following for following in (next(rest, None),) if following is not None)


def whole_name(written: str, names: Mapping[str, bool]) -> str:
    fitting = [written] if written in names else sorted(name for name in names if name.startswith(written))
    if len(fitting) > 1:
        raise AmbiguousOptionError(f"option {written} could be {' or '.join(fitting)}")
    return fitting[0] if fitting else written
