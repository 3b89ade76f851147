"""Base classes of the commands: common options, JSON output, exit codes and suggestions for misspelled names."""

import difflib
import sys
from collections.abc import Callable
from typing import Any

import click

from nemo_lfr.cli.session import FAILED, Session, current, fail, output_rules, print_json
from nemo_lfr.errors import NemoLfrError


def _set(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Return a click callback that stores a flag in the attribute `name` of the session."""

    def store(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            session = context.find_object(Session)
            assert session is not None
            setattr(session, name, True)
            if session.quiet and session.verbose:
                raise click.UsageError("--quiet and --verbose are mutually exclusive; remove one of them.", context)

    return store


def common_options() -> list[click.Parameter]:
    """Return the options that every command has. Users may also pass them before the name of the command."""
    texts = {
        ("--json", "as_json"): "Print the result as JSON on stdout.",
        ("--quiet", "quiet"): "Print only errors on stderr.",
        ("--verbose", "verbose"): "Print log messages, and tracebacks of errors, on stderr.",
    }
    return [
        click.Option([*names], is_flag=True, expose_value=False, is_eager=True, callback=_set(names[1]), help=text)
        for names, text in texts.items()
    ]


class Command(click.Command):
    """Click command whose callback returns a dict, which is printed if --json was passed.

    The dict has all keys of `result` except `failures`, which this class adds. Without --json, the output consists of
    the lines that the callback prints with `print_line`. A callback that writes binary data to stdout returns None.
    The exit code is 1 if the callback recorded failures (`session.fail`).

    Args:
        result: TypedDict that describes the JSON output, from `nemo_lfr.cli.results`.
    """

    def __init__(self, name: str | None, *, result: type, **options: Any) -> None:
        super().__init__(name, **options)
        self.params += common_options()
        self.result = result

    def invoke(self, ctx: click.Context) -> Any:
        """Run the callback, print its result if --json was passed, and exit with code 1 if there were failures."""
        with output_rules(current()):
            values = super().invoke(ctx)
        report(values)


def report(values: dict[str, Any] | None) -> None:
    """Print the result of a command if --json was passed, and exit with code 1 if there were failures.

    Args:
        values: the result; None if the command has written its output itself.
    """
    session = current()
    session.report_failures()
    if values is not None:
        print_json(values)
    if session.lost_output:
        closed = (
            "stdout is closed, so the result was not printed; connect stdout to a file, a pipe or the null device."
        )
        fail("stdout", NemoLfrError(closed))
        session.report_failures()
    if session.failures:
        sys.exit(FAILED)


class Group(click.Group):
    """Group of commands. The error for an unknown command suggests a similar name, or lists all commands."""

    command_class = Command
    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Commands: {', '.join(self.list_commands(ctx))}."
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


class RenamedOption(click.Option):
    """Option that was renamed. The earlier name still works, but is hidden in help texts and shell completion.

    Args:
        earlier: the earlier name, such as "--jobs".
    """

    def __init__(self, *args: Any, earlier: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.earlier = earlier

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Add the current and the earlier name of the option to the parser."""
        super().add_to_parser(parser, ctx)
        parser.add_option(obj=self, opts=[self.earlier], dest=self.name, action="store", nargs=self.nargs)
