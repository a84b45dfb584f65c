"""The door: a run takes the fast path, everything else goes to click; the only place that prints an error.

A run imports a fixed set of modules, all before the first namespace changes: behind the door the host's files are gone, and a
module that is needed for an error message could not be found any more.
"""

from __future__ import annotations

import gc
import sys

from sciexec import called, version
from sciexec.errors import HostError, SciexecError

gc.disable()  # a start makes no garbage, and to look for it while modules load takes a millisecond

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sciexec.options import Options


def main(program: str, arguments: list[str]) -> int:
    """Run one command line; returns the exit code.

    Arguments:
        program: argv[0] or its last part, which decides how we answer (apptainer, singularity).  arguments: the rest of argv.
    """
    debug = False
    try:
        if arguments == ["--version"]:  # what clients call most, often in front of every other call
            print(version(program), flush=True)
            return 0
        from sciexec import environment, options

        chosen = options.parse(program, arguments, environment.host())
        if chosen is None or chosen.is_remote():
            debug = "--debug" in arguments or "-d" in arguments
            answer = command_line(program, arguments)
            if isinstance(answer, int):
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where a closed pipe is caught
                return answer
            chosen = answer
        debug = chosen.debug
        start(chosen)
        return 0
    except SciexecError as error:
        show(error.message, error.hint.replace("`sciexec ", f"`{called(program)} "), debug)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return quiet_end()
    except Exception as error:
        show(f"sciexec itself failed: {type(error).__name__}: {error}", "" if debug else "the same command with --debug says where", debug)
        return 255


def start(chosen: Options) -> None:
    """Become the container's payload, or start an instance and return."""
    from sciexec import host, options

    if chosen.is_instance() and chosen.verb in options.ACTIONS:
        from sciexec import join

        join.join(chosen, host.Host())
    from sciexec import image, run

    opened = image.open_image(chosen.image)
    if chosen.verb in options.STARTS:
        from sciexec import launch

        launch.start(chosen, opened, host.Host())
        return
    run.run(chosen, opened, host.Host())


def command_line(program: str, arguments: list[str]) -> int | Options:
    """Everything that is not plainly a run of a local image.

    It needs third-party packages, which an isolated start leaves out.  Raises HostError where one is missing.
    """
    gc.enable()
    if sys.flags.no_site:
        import site

        ours = sys.path[-1]  # where the launcher found us; pip may have put what we need there
        site.main()
        site.addsitedir(ours)
    try:
        from sciexec import cli

        return cli.main(program, arguments)
    except ModuleNotFoundError as error:
        raise HostError(
            f"{sys.executable} lacks the package {error.name}", "a run needs none; pip installs the others with sciexec"
        ) from error


def show(message: str, hint: str, debug: bool) -> None:
    """An error as the user sees it; clients look for FATAL."""
    if debug:
        sys.__excepthook__(*sys.exc_info())  # needs no module, unlike traceback, which may be out of reach by now
    lines = [f"FATAL: {message}", *([f"       {hint}"] if hint else [])]
    # whatever a name, an image or a server put into it, a terminal gets text; ascii() as no codec can be loaded behind the door
    write("\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines))


def write(text: str) -> None:
    """To stderr in one piece, as many ranks may speak at once; where it is closed, nobody wants to know."""
    import os

    try:
        os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def quiet_end() -> int:
    """The reader of our output has gone (`sciexec ... | head`): end as a program killed by SIGPIPE, without a word."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 141


if __name__ == "__main__":
    sys.exit(main(sys.argv[0], sys.argv[1:]))
