"""Commands that other installed packages add."""

import copy
from typing import Any

import click

from nemo_lfr.cli.command import Group, common_options, report
from nemo_lfr.cli.session import current, output_rules
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.plugins import is_foreign, load_plugin, naming_extension, plugin_names

ENTRY_POINTS = "nemo_lfr.commands"


class PluginGroup(Group):
    """Command group with the built-in commands and the commands of other installed packages.

    Other packages list their commands in the entry-point group `nemo_lfr.commands`. These commands cannot replace
    built-in commands. They get the options that every command has; see `_adopted`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *plugin_names(ENTRY_POINTS)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command. If the command cannot be imported, return one that fails with the reason."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            try:
                command = load_plugin(ENTRY_POINTS, cmd_name)
            except NemoLfrError as error:
                return _unusable(cmd_name, str(error))
            if command is not None and not isinstance(command, click.Command):
                return _unusable(
                    cmd_name, f"{ENTRY_POINTS}: {cmd_name!r} is not a click command; repair or uninstall its package."
                )
        is_adopted = command is not None and command.callback is not None and is_foreign(command.callback)
        return _adopted(command) if command is not None and is_adopted else command


def _adopted(command: click.Command) -> click.Command:
    """Copy another package's command, and add the options --json, --quiet and --verbose to the copy.

    With --json, text that the command prints on stdout goes to stderr. The JSON output contains the list of failures
    and, if the callback returns a dict, the entries of this dict. An option that the command already has is not added.
    """
    adopted = copy.copy(command)
    taken = {name for parameter in command.params for name in parameter.opts}
    adopted.params = [*command.params, *(option for option in common_options() if taken.isdisjoint(option.opts))]

    def invoke(ctx: click.Context) -> Any:
        with output_rules(current()), naming_extension(command.callback, "command"):
            values = command.invoke(ctx)
        report(values if isinstance(values, dict) else {})
        return values

    adopted.invoke = invoke  # type: ignore[method-assign]
    return adopted


def _unusable(name: str, message: str) -> click.Command:
    """Return a command that fails with a message, whatever its arguments are."""

    def fail(arguments: tuple[str, ...]) -> None:
        raise NemoLfrError(message)

    anything = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True}
    return click.Command(name, settings, fail, [anything], short_help="(cannot be loaded)", add_help_option=False)
