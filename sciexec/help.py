"""How help is laid out: commands and options under headings, a line or two each, at most 100 columns wide."""

from __future__ import annotations

import shutil
from typing import Any

import click

from sciexec.completion import Commands
from sciexec.options import LIMITS, OPTIONS

WIDTH = 100
LEFT = 36  # columns for a name and its metavar; longer ones have a line of their own

# What is not named here, because it is newer than these lists, comes last.
COMMANDS = {
    "Runs": "run exec shell test instance",
    "Images": "pull build push inspect apps run-help sif sign verify key overlay data cache",
    "This host": "check alias completion buildcfg version help",
}
THEMES = {
    "Files of the host": "bind mount data home no_home no_mount cwd workdir scratch fusemount",
    "Environment": "cleanenv env env_file no_env no_eval app shell",
    "Isolation": "contain containall compat fakeroot pid no_pid no_init ipc uts hostname net network dns security add_caps drop_caps "
    "no_privs no_umask",
    "Writing into the image": "writable_tmpfs tmpfs_size overlay writable unsquash",
    "Devices": "nv nvccli rocm intel_hpu compat32 device cdi_dirs",
    "MPI": "share sharens",
    "Limits": " ".join(option.slot for option in LIMITS) + " apply_cgroups",
    "Instances": "pid_file",
    "Where IMAGE is a URI": "arch platform authfile docker_login no_https disable_cache",
    "Messages": "help debug verbose quiet nocolor",
}
OTHERS = "Others"


def width() -> int:
    """Columns of the terminal, as many as are good to read; where there is none it matters to nobody."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def slot(param: click.Parameter) -> str:
    """The slot of a row of the table of options, which click knows as row_NUMBER; of another option its name."""
    kind, _, number = str(param.name).rpartition("_")
    return OPTIONS[int(number)].slot if kind == "row" else max(param.opts, key=len).lstrip("-")


def under_headings(formatter: click.HelpFormatter, headings: dict[str, str], rows: list[tuple[str, tuple[str, str]]]) -> None:
    """Write rows, each (key, (left, right)), under the headings that have their keys, in the order given there."""
    for title, keys in {**headings, OTHERS: ""}.items():
        wanted = keys.split()
        if title == OTHERS:
            known = " ".join(headings.values()).split()
            wanted = [key for key, _ in rows if key not in known]
        found = [row for key in dict.fromkeys(wanted) for name, row in rows if name == key]
        if found:
            with formatter.section(title):
                formatter.write_dl(found, col_max=LEFT)


class Group(click.Group):
    """Commands are listed as they were added, the most used first; GROUP.COMMAND, as Singularity 2 wrote it, is GROUP COMMAND."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name, _, below = cmd_name.partition(".")
        command = super().get_command(ctx, name)
        return command.get_command(ctx, below) if below and isinstance(command, click.Group) else super().get_command(ctx, cmd_name)


class Program(Group):
    """The group of all commands, under headings."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = [(name, self.commands[name]) for name in self.commands if not self.commands[name].hidden]
        limit = formatter.width - 6 - max(len(name) for name, _ in found)
        under_headings(formatter, COMMANDS, [(name, (name, command.get_short_help_str(limit))) for name, command in found])


EPILOG = "SCIEXEC_X sets an option where the command line does not; so do APPTAINER_X and, behind that, SINGULARITY_X."


class Themed(click.Command):
    """A command with options out of the table, under headings."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text(EPILOG)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = [(slot(param), param.get_help_record(ctx)) for param in self.get_params(ctx) if isinstance(param, click.Option)]
        under_headings(formatter, THEMES, [(key, record) for key, record in records if record])


def tree(command: click.Command, ctx: click.Context, path: str = "") -> list[Commands]:
    """A command and all below it, as completion needs them; what is hidden is left out."""
    flags: list[tuple[list[str], str]] = []
    values: list[tuple[list[str], str]] = []
    for param in command.get_params(ctx):
        if isinstance(param, click.Option) and not param.hidden:
            names = [*param.opts, *param.secondary_opts]
            (flags if param.is_flag or param.count else values).append((names, str(param.help or "").split(" [SCIEXEC_")[0]))
    below: dict[str, Any] = {}
    if isinstance(command, click.Group):
        below = {name: command.commands[name] for name in command.commands if not command.commands[name].hidden}
    found = [Commands(path, command.get_short_help_str(80), list(below), flags, values)]
    for name, other in below.items():
        found += tree(other, ctx, f"{path} {name}".strip())
    return found
