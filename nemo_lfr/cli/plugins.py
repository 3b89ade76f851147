"""Commands that other installed packages add."""

import click

from nemo_lfr.cli.command import Group
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.plugins import load_plugin, plugin_names

ENTRY_POINTS = "nemo_lfr.commands"


class PluginGroup(Group):
    """Command group with the built-in commands and the commands of other installed packages.

    Other packages list their commands in the entry-point group `nemo_lfr.commands`. These commands cannot replace
    built-in commands.
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
        return command


def _unusable(name: str, message: str) -> click.Command:
    """Return a command that fails with a message, whatever its arguments are."""

    def fail(arguments: tuple[str, ...]) -> None:
        raise NemoLfrError(message)

    anything = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True}
    return click.Command(name, settings, fail, [anything], short_help="(cannot be loaded)", add_help_option=False)
