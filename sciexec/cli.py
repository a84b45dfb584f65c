"""The command line: click's commands, each a few lines that call the room where the work is done.

    door --> main() --> a command --> 0, another exit code, or the Options of a run, which the door starts

A command prints its result on stdout; progress and warnings go to stderr.  It raises SciexecError, never exits.  Whatever
costs time to import is imported inside the command that needs it.  A command's exit code is what it returns; None is 0.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from sciexec import called, options, version
from sciexec.errors import UsageError
from sciexec.help import Group, Program, Themed, width
from sciexec.options import FLAG, LATER, LIST, NEVER, OPTIONS, READY, Option, Options

if TYPE_CHECKING:
    from convert.progress import Progress
    from convert.pull import Settings


def main(program: str, arguments: list[str]) -> int | Options:
    """Read a command line and obey; returns the exit code, or what the door shall run.

    Arguments: those of sciexec.__main__.main.  Raises SciexecError; UsageError for what click finds wrong.
    """
    shown = called(program)
    try:
        answer = commands.main(arguments or ["--help"], prog_name=shown, standalone_mode=False, obj={"program": program})
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except click.ClickException as error:
        said = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        path = said or " ".join([shown, *(word for word in arguments if word in commands.commands)][:2])
        raise UsageError(f"{path}: {error.format_message().rstrip('.')}", f"see `{path} --help`") from error
    return answer if isinstance(answer, (int, Options)) else 0


# --- options from the table -------------------------------------------------------------------------------------------------


def click_option(number: int, row: Option) -> click.Option:
    """A row of the table for click.  What this release lacks is known all the same, to be refused by its name."""
    hints = " ".join(f"SCIEXEC_{key}" for key in row.keys[:1])
    return click.Option(
        [f"row_{number}", *row.names],
        is_flag=row.kind == FLAG,
        multiple=row.kind == LIST,
        metavar=row.metavar or None,
        help=f"{row.help} [{hints}]" if hints else row.help,
        hidden=row.state != READY,
        default=None if row.kind == LIST else (False if row.kind == FLAG else None),
    )


def click_options(verb: str) -> list[click.Parameter]:
    return [click_option(number, row) for number, row in enumerate(OPTIONS) if verb in row.verbs]


def by_slot(given: dict[str, Any]) -> dict[str, options.Value]:
    """The values that click found, as options.settle() takes them.  Raises UsageError for an option that is refused."""
    values: dict[str, options.Value] = {}
    for number, row in enumerate(OPTIONS):
        value = given.pop(f"row_{number}", None)
        if value in (None, False, ()):
            continue
        if row.state in (LATER, NEVER):
            raise options.refused(row, row.names[0])
        values[row.slot] = list(value) if row.kind == LIST else value
    return values


class Run(Themed):
    """run, exec, shell, test, instance start or instance run: IMAGE ends the options, everything behind it is the payload's."""

    def __init__(self, verb: str, usage: str, help: str) -> None:
        self.verb = verb
        image = click.Argument(["image"], metavar="IMAGE")
        name = [click.Argument(["instance"], metavar="NAME")] if verb in options.STARTS else []
        argv = click.Argument(["argv"], nargs=-1, type=click.UNPROCESSED, required=verb == "exec", metavar=usage)
        parameters = [*click_options(verb), image, *name, argv]
        settings = {"allow_interspersed_args": False}
        super().__init__(verb.rpartition(" ")[2], context_settings=settings, callback=self.settle, params=parameters, help=help)

    def settle(self, image: str, argv: tuple[str, ...], instance: str | None = None, **given: Any) -> Options:
        from sciexec import environment

        context = click.get_current_context()
        values = {**context.obj.get("values", {}), **by_slot(given)}
        words = [*([] if instance is None else [instance]), *argv]
        return fetched(options.settle(context.obj["program"], self.verb, values, image, words, environment.host()))


def fetched(chosen: Options) -> Options:
    """`chosen` with an image that is a local file: one that is named by a URI is converted into the cache first."""
    if chosen.is_remote():
        from convert import pull
        from convert.progress import Silent, progress

        settings = pull.Settings(
            arch=chosen.arch or None, authfile=chosen.authfile or "", no_https=chosen.no_https, disable_cache=chosen.disable_cache
        )
        # A run says nothing of its own where nobody watches: its stderr is the payload's.
        with progress(chosen.quiet) if sys.stderr.isatty() else Silent() as shown:
            chosen.image = pull.cached(chosen.image, settings, shown)
    return chosen


# --- the commands -----------------------------------------------------------------------------------------------------------


def show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(version(ctx.obj["program"]))
        ctx.exit()


@click.group(
    cls=Program, params=click_options("global"), context_settings={"help_option_names": ["-h", "--help"], "terminal_width": width()}
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="print the version and exit")
@click.pass_context
def commands(ctx: click.Context, /, **given: Any) -> None:
    """Run scientific software out of one file, as yourself: Docker and OCI images become SIF files, SIF files run."""
    ctx.obj["values"] = by_slot(given)


commands.add_command(Run("run", "[ARGUMENT]...", "Run what IMAGE is made to run: its runscript, or its ENTRYPOINT and CMD."))
commands.add_command(Run("exec", "COMMAND [ARGUMENT]...", "Run COMMAND in IMAGE."))
commands.add_command(Run("shell", "[ARGUMENT]...", "Start a shell in IMAGE."))
commands.add_command(Run("test", "[ARGUMENT]...", "Run the test that IMAGE brings along, if it does."))


@commands.group(cls=Group)
def instance() -> None:
    """Containers in the background, which have a name.

    instance://NAME stands for an image then.
    """


instance.add_command(Run("start", "[ARGUMENT]...", "Start IMAGE in the background: its startscript, if it has one."))
instance.add_command(Run("instance run", "[ARGUMENT]...", "Start IMAGE in the background: what it is made to run."))
of_user = click.option("--user", "-u", metavar="NAME", default="", help="whose; others' are root's to see")


@instance.command("list")
@click.option("--json", "-j", "as_json", is_flag=True, help="as JSON")
@click.option("--logs", "-l", is_flag=True, help="and where their output is")
@click.option("--all", "-a", "_everything", is_flag=True, hidden=True)
@of_user
@click.argument("pattern", metavar="[GLOB]", default="*")
def instance_list(as_json: bool, logs: bool, _everything: bool, user: str, pattern: str) -> None:
    """List the instances that run on this host."""
    from sciexec import host, instance

    found = instance.find_all(instance.whose(host.Host(), user), pattern)
    click.echo(instance.listing(found, as_json=as_json, logs=logs), nl=False)


@instance.command("stop")
@click.option("--all", "-a", "everything", is_flag=True, help="all instances")
@click.option("--force", "-F", is_flag=True, help="with SIGKILL")
@click.option("--signal", "-s", metavar="NAME", default="SIGINT", help="the signal to send, by name or number [SIGINT]")
@click.option("--timeout", "-t", type=click.IntRange(min=0), metavar="SECONDS", default=10, help="until SIGKILL follows [10]")
@of_user
@click.argument("pattern", metavar="[NAME|GLOB]", default="")
@click.pass_context
def instance_stop(ctx: click.Context, everything: bool, force: bool, signal: str, timeout: int, user: str, pattern: str) -> None:
    """Stop instances: all processes in them have ended then."""
    from sciexec import host, instance

    if not everything and not pattern:
        raise UsageError("instance stop: neither a name nor --all is given", "see `sciexec instance stop --help`")
    number = instance.signal_number("SIGKILL" if force else signal)
    found = instance.chosen(instance.whose(host.Host(), user), "*" if everything else pattern)
    instance.stop(found, number, timeout, quiet=bool(ctx.obj["values"].get("quiet")))


@instance.command("stats")
@click.option("--json", "-j", "as_json", is_flag=True, help="once, as JSON")
@click.option("--no-stream", is_flag=True, help="once, not every second")
@of_user
@click.argument("name")
def instance_stats(as_json: bool, no_stream: bool, user: str, name: str) -> None:
    """Show what an instance uses: CPU, memory, input and output, processes."""
    from sciexec import host, instance, stats

    for found in instance.chosen(instance.whose(host.Host(), user), name)[:1]:
        stats.stats(found, click.echo, as_json=as_json, stream=not no_stream)


@commands.command()
@click.argument("image", required=False)
def check(image: str | None) -> int:
    """Say whether this host can run images, and what to do where it cannot.

    IMAGE, if given, is run as well.
    """
    from convert import blobs
    from sciexec import doctor

    def cache() -> str:
        return blobs.Cache(blobs.directory()).path

    return doctor.check(image, click.echo, cache)


@commands.command("version")
@click.pass_context
def bare_version(ctx: click.Context) -> None:
    """Print the version's number alone."""
    click.echo(version(ctx.obj["program"]).rpartition(" ")[2])


@commands.command("help")
@click.argument("command", nargs=-1)
@click.pass_context
def help_on(ctx: click.Context, command: tuple[str, ...]) -> None:
    """Print the help of COMMAND."""
    commands.main([*command, "--help"], prog_name=ctx.find_root().info_name, standalone_mode=False, obj=ctx.obj)


@commands.group(cls=Group)
def alias() -> None:
    """Let `apptainer` and `singularity` mean sciexec."""


@alias.command("install")
@click.argument("directory")
@click.option("--force", "-F", is_flag=True, help="replace other programs of these names")
def alias_install(directory: str, force: bool) -> None:
    """Write `apptainer` and `singularity` into DIRECTORY, which should come first in PATH."""
    from sciexec import switch

    for path in switch.install(directory, force=force):
        click.echo(path)


@alias.command("remove")
@click.argument("directory")
def alias_remove(directory: str) -> None:
    """Remove them from DIRECTORY; other programs of these names are left alone."""
    from sciexec import switch

    for path in switch.remove(directory):
        click.echo(path)


@commands.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what completes command lines in SHELL: bash, zsh or fish."""
    from sciexec import completion, help

    click.echo(completion.script(shell, str(ctx.find_root().info_name), help.tree(commands, ctx)), nl=False)


@commands.command()
@click.argument("key", required=False)
@click.pass_context
def buildcfg(ctx: click.Context, key: str | None) -> None:
    """Print how this was installed: KEY=VALUE lines, or the value of KEY."""
    from sciexec import switch

    found = switch.buildcfg(ctx.obj["program"])
    if key is not None and key not in found:
        raise UsageError(f"buildcfg: there is no value named {key!r}", f"there are {', '.join(found)}")
    click.echo(found[key] if key is not None else "\n".join(f"{name}={value}" for name, value in found.items()))


# --- images: made, looked at, kept ------------------------------------------------------------------------------------------

PACKING = (
    click.option("--compression", metavar="NAME[:LEVEL]", help="zstd (the default, level 3), gzip, lz4 or xz"),
    click.option("--block-size", type=int, metavar="BYTES", help="of the SquashFS, a power of two [131072]"),
    click.option("--force", "-F", is_flag=True, help="replace what is there"),
    click.option("--quiet", "-q", is_flag=True, help="say errors only"),
)
CONVERSION = (
    *PACKING[:2],
    click.option("--max-entries", type=int, metavar="N", help="refuse an image of more files [500000]"),
    click.option("--max-bytes", type=int, metavar="BYTES", help="refuse an image that is larger uncompressed [1 TiB]"),
    click.option("--max-ratio", type=int, metavar="N", help="refuse a layer that grows more times when decompressed [500]"),
    click.option("--arch", metavar="NAME", help="architecture to choose: amd64, arm64 ..."),
    click.option("--authfile", metavar="PATH", help="credentials for the registry, as docker's config.json"),
    click.option("--no-https", is_flag=True, default=None, help="speak http to the registry"),
    click.option("--disable-cache", is_flag=True, default=None, help="keep nothing of what a registry sends"),
    *PACKING[2:],
)


def conversion(command: Callable[..., Any], flags: tuple[Callable[..., Any], ...] = CONVERSION) -> Callable[..., Any]:
    """The flags of whatever converts: they arrive as `settings` (convert.pull.Settings), `progress` and `force`."""

    @functools.wraps(command)
    def settled(*arguments: Any, quiet: bool, **given: Any) -> None:
        from convert.progress import progress
        from convert.pull import Settings

        fields = Settings.__dataclass_fields__
        chosen = {name: given.pop(name) for name in list(given) if name in fields}
        repack = chosen["compression"] is not None or chosen["block_size"] is not None
        settings = Settings(repack=repack, **{name: value for name, value in chosen.items() if value is not None and name != "compression"})
        if chosen["compression"] is not None:
            settings = settings.compressed(chosen["compression"])
        with progress(quiet or bool(click.get_current_context().obj["values"].get("quiet"))) as shown:
            result = command(*arguments, settings=settings, progress=shown, **given)
        click.echo(result)

    return functools.reduce(lambda function, option: option(function), reversed(flags), settled)


def packing(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of whatever packs a directory, as those of `conversion`."""
    return conversion(command, PACKING)


@commands.command()
@click.argument("operands", nargs=-1, required=True, metavar="[OUT] URI")
@click.option("--name", default="", hidden=True)
@click.option(
    "--dir",
    "directory",
    metavar="PATH",
    default="",
    envvar=[f"{prefix}{key}" for prefix in options.PREFIXES for key in ("PULLDIR", "PULLFOLDER")],
    help="where to write",
)
@conversion
def pull(operands: tuple[str, ...], name: str, directory: str, settings: Settings, progress: Progress, force: bool) -> str:
    """Fetch an image and make one SIF file of it.

    URI begins with docker://, docker-archive:, oci: or oci-archive:.
    """
    from convert import pull, reference

    *out, uri = operands
    if len(out) > 1:
        raise UsageError(f"pull: {out[1]}: one file name and one URI, no more", "see `sciexec pull --help`")
    path = os.path.join(directory, *(out or [name or reference.parse(uri).default_output()]))
    return pull.pull(uri, path, settings, progress, force=force)


@commands.command()
@click.option("--fakeroot", "-f", is_flag=True, expose_value=False, hidden=True, help="nothing is done as root, nor needs to be")
@click.argument("out")
@click.argument("spec")
@click.option("--sandbox", "-s", is_flag=True, help="make a directory instead of a file")
@click.option("--data", "as_data", is_flag=True, help="pack the directory SPEC as data")
@conversion
def build(out: str, spec: str, sandbox: bool, as_data: bool, settings: Settings, progress: Progress, force: bool) -> str:
    """Make the image OUT of SPEC: a URI, a SIF, a SquashFS or a sandbox directory."""
    from convert import build, data

    if as_data and sandbox:
        raise UsageError("build: data are packed into a file, and --sandbox asks for a directory", "cp -a copies a directory")
    if as_data:
        return data.package(spec, out, settings, progress, force=force)
    return build.build(out, spec, settings, progress, as_sandbox=sandbox, force=force)


@commands.group("data", cls=Group)
def data_sets() -> None:
    """Pack data sets: a directory of many files becomes one file, which --data shows."""


@data_sets.command("package")
@click.argument("directory", metavar="DIR")
@click.argument("out", metavar="OUT.sif")
@click.option("--name", default="", metavar="NAME", help="of the data [the directory's]")
@packing
def data_package(directory: str, out: str, name: str, settings: Settings, progress: Progress, force: bool) -> str:
    """Make the data image OUT.sif of the directory DIR."""
    from convert import data

    return data.package(directory, out, settings, progress, name=name, force=force)


@data_sets.command("add")
@click.argument("image", metavar="IMAGE.sif")
@click.argument("directory", metavar="DIR")
@click.option("--name", default="", metavar="NAME", help="of the data [the directory's]")
@packing
def data_add(image: str, directory: str, name: str, settings: Settings, progress: Progress, force: bool) -> str:
    """Put the directory DIR into IMAGE.sif, where --data NAME finds it."""
    from convert import data

    return data.add(image, directory, settings, progress, name=name, force=force)


ATTRIBUTES = {
    "labels": "-l", "deffile": "-d", "runscript": "-r", "startscript": "-s", "test": "-t", "environment": "-e", "helpfile": "-H",
}  # fmt: skip


@commands.command(
    "inspect", params=[click.Option([short, f"--{name}", name], is_flag=True, help=f"the {name}") for name, short in ATTRIBUTES.items()]
)
@click.option("--all", "everything", is_flag=True, help="all of them, as JSON")
@click.option("--json", "-j", "as_json", is_flag=True, help="as JSON")
@click.option("--app", metavar="NAME", default="", help="of this SCIF application")
@click.option("--list-apps", is_flag=True, help="the names of the SCIF applications")
@click.argument("image")
def inspect_image(image: str, everything: bool, as_json: bool, app: str, list_apps: bool, **wanted: bool) -> None:
    """Show what IMAGE says about itself: its labels, unless told otherwise.

    Nothing of it is executed.
    """
    from sciexec import inspect

    chosen = [name for name, asked in wanted.items() if asked or everything]
    terminal = sys.stdout.isatty()
    text = inspect.inspect(image, chosen, as_json=as_json or everything, app=app, list_apps=list_apps, terminal=terminal)
    click.echo(text, nl=False)


@commands.command()
@click.argument("image")
def apps(image: str) -> None:
    """List the SCIF applications of IMAGE."""
    from sciexec import inspect

    click.echo(inspect.inspect(image, list_apps=True, terminal=sys.stdout.isatty()), nl=False)


@commands.command("run-help")
@click.option("--app", metavar="NAME", default="", help="of this SCIF application")
@click.argument("image")
def run_help(image: str, app: str) -> None:
    """Print what the makers of IMAGE say about its use."""
    from sciexec import inspect

    text = inspect.inspect(image, ["helpfile"], app=app, terminal=sys.stdout.isatty())
    click.echo(text or "No help sections were defined for this image\n", nl=False)


@commands.group(cls=Group)
def sif() -> None:
    """Look into a SIF file."""


@sif.command("list")
@click.argument("image")
def sif_list(image: str) -> None:
    """List the objects of IMAGE."""
    from sciexec import inspect

    click.echo(inspect.sif_list(image), nl=False)


@sif.command("header")
@click.argument("image")
def sif_header(image: str) -> None:
    """Show the global header of IMAGE."""
    from sciexec import inspect

    click.echo(inspect.sif_header(image), nl=False)


@sif.command("info")
@click.argument("number", metavar="ID", type=int)
@click.argument("image")
def sif_info(number: int, image: str) -> None:
    """Show the descriptor of object ID of IMAGE."""
    from sciexec import inspect

    click.echo(inspect.sif_info(image, number), nl=False)


@sif.command("dump")
@click.argument("number", metavar="ID", type=int)
@click.argument("image")
def sif_dump(number: int, image: str) -> None:
    """Write the bytes of object ID of IMAGE to stdout."""
    from sciexec import inspect

    inspect.sif_dump(image, number, sys.stdout.fileno())


@commands.group(cls=Group)
def overlay() -> None:
    """Make overlays to write to."""


@overlay.command("create")
@click.option("--size", "-s", type=int, default=64, metavar="MIB", help="of the file system, in MiB [64]")
@click.option("--sparse", "-S", is_flag=True, help="take no room for what is not used yet")
@click.option("--create-dir", "directories", multiple=True, metavar="PATH", help="make a directory in it; may be given several times")
@click.option("--fakeroot", "-f", is_flag=True, help="for runs with --fakeroot by Apptainer, which maps no other owner")
@click.argument("image")
def overlay_create(image: str, size: int, sparse: bool, directories: tuple[str, ...], fakeroot: bool) -> None:
    """Make the ext3 image IMAGE for --overlay, or an overlay partition in it if it is a SIF."""
    from sciexec import blank

    blank.create(image, size=size, sparse=sparse, directories=list(directories), fakeroot=fakeroot)


@commands.group(cls=Group)
def cache() -> None:
    """Look after the cache of blobs and converted images."""


KINDS = {"all": (), "blob": ("blob", "temporary"), "oci": ("image",), "image": ("image",)}
of_type = click.option("--type", "-T", "kind", type=click.Choice(list(KINDS)), default="all", help="blobs, or converted images")


@cache.command("list")
@of_type
@click.option("--verbose", "-v", is_flag=True, help="every file")
def cache_list(kind: str, verbose: bool) -> None:
    """Say what the cache holds."""
    from convert import blobs

    entries = [entry for entry in blobs.Cache(blobs.directory()).list() if not KINDS[kind] or entry.kind in KINDS[kind]]
    for entry in entries if verbose else ():
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created))
        click.echo(f"{entry.kind:<9} {made}  {entry.size / 1e6:>10.2f} MB  {entry.name}  {' '.join(entry.sources)}".rstrip())
    for name, noun in (("image", "converted image"), ("blob", "blob")):
        found = [entry.size for entry in entries if entry.kind == name]
        click.echo(f"{len(found)} {noun}{'' if len(found) == 1 else 's'}, {sum(found) / 1e6:.2f} MB")


@cache.command("clean")
@of_type
@click.option("--days", "-D", type=click.FloatRange(min=0), help="only what is older")
@click.option("--dry-run", "-n", is_flag=True, help="say what would be removed")
@click.option("--force", "-f", is_flag=True, help="do not ask (sciexec never does)")
def cache_clean(kind: str, days: float | None, dry_run: bool, force: bool) -> None:
    """Remove what the cache holds; whatever is needed again comes from its source."""
    from convert import blobs

    for entry in blobs.Cache(blobs.directory()).clean(days, dry_run, KINDS[kind] or None):
        click.echo(f"{'would remove' if dry_run else 'removed'} {entry.kind} {entry.name}")
