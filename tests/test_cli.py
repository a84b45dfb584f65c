"""The command as people and programs call it: versions, help, errors, exit codes, and how it is started."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import sciexec as package
from sciexec import options

TREE = Path(__file__).resolve().parent.parent
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def call(*command: str | Path, env: Mapping[str, str] | None = None, **given: object) -> subprocess.CompletedProcess[str]:
    """Run a command with no environment but `env`."""
    words = [str(word) for word in command]
    return subprocess.run(words, env=dict(env or {}), capture_output=True, text=True, timeout=60, check=False, **given)  # type: ignore[call-overload, no-any-return]


# --- versions ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sciexec", "apptainer", "singularity"])
def alias(request: pytest.FixtureRequest, sciexec_path: Path, tmp_path: Path) -> Path:
    """The installed command under another name."""
    path = tmp_path / str(request.param)
    path.symlink_to(sciexec_path)
    return path


def test_version_by_name(alias: Path) -> None:
    """As Snakemake (last word, PEP 440), cwltool (a regular expression) and EasyBuild (the first number) read it."""
    expected = {"sciexec": "sciexec version ", "apptainer": "apptainer version 1.4.5+", "singularity": "singularity-ce version 4.3.1+"}
    done = call(alias, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(expected[alias.name])
    assert done.stdout.endswith(f"{package.__version__}\n")
    assert re.fullmatch(r"(.+) version ([0-9\.]+)(\+sciexec\.[0-9.]+)?\n", done.stdout)
    for same in (["-q", "--version"], ["--quiet", "--silent", "--version"]):
        assert call(alias, *same).stdout == done.stdout
    assert call(alias, "version").stdout == done.stdout.rpartition(" ")[2]


def test_the_version_is_that_of_the_package() -> None:
    text = (TREE / "pyproject.toml").read_text()
    assert f'\nversion = "{package.__version__}"\n' in text or "\ndynamic = " in text


# --- help and errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["help"]])
def test_help(sciexec: Command, words: list[str]) -> None:
    done = sciexec(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: sciexec [OPTIONS] COMMAND")
    assert re.findall(r"^  (run|exec|shell|check) ", done.stdout, re.M) == ["run", "exec", "shell", "check"]


def test_help_of_a_command_shows_what_there_is_and_nothing_else(sciexec: Command) -> None:
    done = sciexec("exec", "--help")
    assert done.stdout == sciexec("help", "exec").stdout == sciexec("exec", "-e", "--help", "img").stdout
    assert sciexec("help", "sif", "list").stdout.startswith("Usage: sciexec sif list ")
    assert "--bind" in done.stdout
    assert "SCIEXEC_BIND" in done.stdout
    assert "--nv" not in done.stdout


EVERY_HELP = """
import sys
from sciexec import cli, help
import click
for command in help.tree(cli.commands, click.Context(cli.commands)):
    print(f"\\f{command.path}")
    cli.main("sciexec", [*command.path.split(), "--help"])
"""


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_help_of_every_command_is_there_and_fits(columns: int) -> None:
    done = call(sys.executable, "-c", EVERY_HELP, env={"PYTHONPATH": str(TREE), "COLUMNS": str(columns)})
    assert (done.returncode, done.stderr) == (0, "")
    texts = dict(text.split("\n", 1) for text in done.stdout.split("\f")[1:])
    assert {"", "exec", "instance list", "sif dump", "alias install", "run-help"} <= set(texts)
    assert len(texts) >= 30
    for path, text in texts.items():
        assert text.startswith(f"Usage: sciexec {path}".strip() + " "), path
        assert max(map(len, text.splitlines())) <= min(100, columns), path
        if columns >= 100:
            lists = re.findall(r"^(?:Commands|Runs|Images|This host|Others):\n((?:  .*\n)+)", text, re.M)
            assert not re.search(r"\.\.\.$", "".join(lists), re.M), path  # cut off


def test_every_option_of_a_run_stands_under_a_heading_with_its_variable(sciexec: Command) -> None:
    text = sciexec("shell", "--help").stdout
    headings = re.findall(r"^(\w.*):$", text, re.M)
    assert headings[:2] == ["Files of the host", "Environment"]
    assert headings[-1] == "Messages"
    for option in options.rows("shell"):
        shown = re.search(rf"^  (?:-\w, )?{option.names[0]}[ ,]", text, re.M)
        assert bool(shown) is (option.state == options.READY), option.names
        if shown and option.keys:
            assert f"[SCIEXEC_{option.keys[0]}]" in text
    assert "SCIEXEC_X sets an option" in text


def test_the_name_that_was_called_is_the_name_in_help_and_errors(alias: Path) -> None:
    name = alias.name
    assert call(alias, "--help").stdout.startswith(f"Usage: {name} [OPTIONS] COMMAND")
    assert call(alias, "exec", "--help").stdout.startswith(f"Usage: {name} exec [OPTIONS] IMAGE COMMAND")
    assert call(alias, "exec", "--nosuch", "i", "c").stderr.endswith(f"\n       see `{name} exec --help`\n")
    assert f"`{name} inspect --list-apps IMAGE`" in call(alias, "exec", "--app", "a/b", TREE, "c").stderr
    assert call(alias, "nosuch").stderr.startswith(f"FATAL: {name}: No such command 'nosuch'")


def test_a_command_as_singularity_2_wrote_it(sciexec: Command) -> None:
    assert sciexec("sif.list", "/no/image").stderr == "FATAL: opening /no/image: no such file or directory\n"
    assert sciexec("sif.list", "--help").stdout.startswith("Usage: sciexec sif.list")
    for name in ("sif.nosuch", "exec.list", ".list", "sif."):
        assert "No such command" in sciexec(name).stderr


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["nosuch"], "sciexec: No such command 'nosuch'", "see `sciexec --help`"),
        (["exec", "--nosuch", "i", "c"], "sciexec exec: No such option", "see `sciexec exec --help`"),
        (["exec", "--bind"], "sciexec exec: Option '--bind' requires an argument", "see `sciexec exec --help`"),
        (["exec"], "sciexec exec: Missing argument 'IMAGE'", "see `sciexec exec --help`"),
        (["exec", "img"], "sciexec exec: Missing argument 'COMMAND", "see `sciexec exec --help`"),
        (["exec", "--nv", "img", "c"], "--nv is an option of Apptainer that this release of sciexec lacks", "`sciexec run --help`"),
        (["exec", "--mount", "x", "img", "c"], "--mount x: x is no key of a bind mount", "src, dst, ro"),
        (["exec", "--nv", "img", "c"], "--nv is an option of Apptainer", "`sciexec run --help`"),
        (["exec", "-B", "/a:b", "img", "c"], "--bind /a:b: the path inside must begin with a slash", ""),
    ],
)
def test_a_wrong_command_line_is_1_and_two_lines(sciexec: Command, words: list[str], message: str, hint: str) -> None:
    done = sciexec(*words)
    assert (done.returncode, done.stdout) == (1, "")
    first, *rest = done.stderr.splitlines()
    assert first.startswith(f"FATAL: {message}")
    assert [line.strip()[: len(hint)] for line in rest] == ([hint] if hint else [])


def test_a_missing_image_is_255_and_no_traceback(sciexec: Command) -> None:
    done = sciexec("exec", "/no/such.sif", "true")
    assert (done.returncode, done.stdout) == (255, "")
    assert re.fullmatch(r"FATAL: [^\n]*/no/such\.sif: no such file or directory\n", done.stderr)


def test_debug_shows_the_traceback_and_the_plan(sciexec: Command, rootfs: Path) -> None:
    done = sciexec("--debug", "exec", "/no/such.sif", "true")
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert "\nFATAL: " in done.stderr
    done = sciexec("exec", "--debug", rootfs, "true")
    assert done.returncode == 0
    assert f"directory {rootfs}\n" in done.stderr
    # an error behind the pivot_root, where no module of the host can be loaded any more
    done = sciexec("exec", "--debug", rootfs, "nosuch")
    assert done.stderr.endswith('FATAL: "nosuch": executable file not found in $PATH\n')


def test_names_cannot_write_to_the_terminal(sciexec: Command, rootfs: Path) -> None:
    for words in (["exec", "/no/\x1b[2J.sif", "true"], ["exec", rootfs, "\x1b[2J"], ["exec", "-B", "/\x1b[2J", rootfs, "true"]):
        done = sciexec(*words)
        assert done.returncode == 255
        assert "\x1b" not in done.stderr


def test_a_defect_of_ours_is_one_line(tmp_path: Path) -> None:
    program = "import sys; from sciexec import __main__ as door, options\n"
    program += "options.parse = lambda *given: 1 / 0\nsys.exit(door.main('sciexec', sys.argv[1:]))"
    done = call(sys.executable, "-c", program, "exec", "i", "c", env={"PYTHONPATH": str(TREE)})
    assert done.returncode == 255
    assert done.stderr.splitlines()[0] == "FATAL: sciexec itself failed: ZeroDivisionError: division by zero"
    assert "--debug" in done.stderr


def test_a_missing_package_is_named() -> None:
    program = "import sys; sys.modules['click'] = None; from sciexec.__main__ import main; sys.exit(main('sciexec', ['--help']))"
    done = call(sys.executable, "-c", program, env={"PYTHONPATH": str(TREE)})
    assert (done.returncode, done.stdout) == (255, "")
    assert done.stderr.startswith(f"FATAL: {sys.executable} lacks the package click\n")


# --- exit codes, signals, descriptors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 37, 126, 127, 255])
def test_the_exit_code_is_the_payloads(sciexec: Command, rootfs: Path, code: int) -> None:
    done = sciexec("exec", rootfs, "sh", "-c", f"exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGUSR1, signal.SIGPIPE])
def test_death_by_signal_is_the_payloads(sciexec: Command, rootfs: Path, number: int) -> None:
    assert sciexec("exec", rootfs, "sh", "-c", f"kill -{number} $$").returncode == -number


def test_sigpipe_is_as_a_program_expects_it(sciexec_path: Path, rootfs: Path) -> None:
    done = call(
        "/bin/sh",
        "-c",
        f"{sciexec_path} exec {rootfs} sh -c 'while echo y; do :; done; echo went on >&2' | head -n 1",
        env={"PATH": "/usr/bin:/bin"},
    )
    assert (done.stdout, done.stderr) == ("y\n", "")


def test_a_reader_that_goes_away_is_no_error(sciexec_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    for words, code in ((["--version"], 141), (["--help"], 1)):  # 1 is click's
        done = subprocess.run([sciexec_path, *words], stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (code, b"")
    os.close(write)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_descriptors(sciexec_path: Path, rootfs: Path, closed: int) -> None:
    """`sciexec ... >&-`: the payload still runs and nothing of ours turns up in the hole."""
    redirection = {0: "<&-", 1: ">&-", 2: "2>&-"}[closed]
    inside = "sh -c 'for n in 0 1 2; do if [ -e /proc/self/fd/$n ]; then c=$c$n; fi; done; exit 1$c'"
    kept = int("1" + "012".replace(str(closed), ""))
    done = call("/bin/sh", "-c", f"exec {sciexec_path} exec {rootfs} {inside} {redirection}", env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == kept % 256
    done = call("/bin/sh", "-c", f"exec {sciexec_path} --version {redirection}")
    assert done.returncode == 0


def test_stdin_reaches_the_payload(sciexec: Command, rootfs: Path) -> None:
    assert sciexec("exec", rootfs, "cat", input="a\nb\n").stdout == "a\nb\n"


# --- how it is started ------------------------------------------------------------------------------------------------------


def test_an_empty_environment_is_enough(sciexec_path: Path, rootfs: Path, tmp_path: Path) -> None:
    done = call(sciexec_path, "exec", "--no-home", "--env", "X=1", rootfs, "env", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "X=1\n" in done.stdout
    assert not re.search("^(LC_CTYPE|PYTHON.*|_)=", done.stdout, re.M)


def test_as_nextflow_calls_it(sciexec_path: Path, rootfs: Path, tmp_path: Path) -> None:
    singularity = tmp_path / "singularity"
    singularity.symlink_to(sciexec_path)
    line = f"env - PATH='{tmp_path}:/usr/bin:/bin' SINGULARITYENV_X='a b;$HOME' singularity exec --no-home -B {tmp_path} {rootfs} "
    line += "/bin/sh -c 'cd /; echo \"$X\"'"
    done = call("/bin/sh", "-c", line, env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path)
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert (done.stdout, done.stderr, done.returncode) == (f"a b;{home}\n", "", 0)  # evaluated, as Apptainer does


def test_the_python_of_the_caller_is_not_ours(sciexec_path: Path, rootfs: Path, tmp_path: Path) -> None:
    """A PYTHONPATH full of traps, a python3 on PATH that is none, a startup file, a current directory with our modules' names."""
    for name in ("sciexec", "click", "os", "sitecustomize", "usercustomize", "errno"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('trapped')\n")
    (tmp_path / "python3").write_text("#!/bin/sh\necho trapped\n")
    (tmp_path / "python3").chmod(0o755)
    env = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nowhere", "PYTHONSTARTUP": str(tmp_path / "os.py"), "PATH": str(tmp_path)}
    assert call(sciexec_path, "--version", env=env, cwd=tmp_path).stdout.startswith("sciexec version")
    assert call(sciexec_path, "exec", rootfs, "echo", "fine", env=env, cwd=tmp_path).stdout == "fine\n"
    assert call(sciexec_path, "--help", env=env, cwd=tmp_path).stdout.startswith("Usage: ")


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The launcher and the package as the several ways of installing leave them; nothing else beside them."""
    number = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = {
        "prefix": f"usr/lib/{number}/site-packages",
        "lib64": f"usr/lib64/{number}/site-packages",
        "debian": "usr/lib/python3/dist-packages",
        "user": f".local/lib/{number}/site-packages",
        "target": "opt/packages",
        "tree": "src",
    }[str(request.param)]
    folder = {"prefix": "usr", "lib64": "usr", "debian": "usr", "user": ".local", "target": "opt/packages", "tree": "src"}[
        str(request.param)
    ]
    launcher = tmp_path / "a place" / folder / "bin/sciexec"
    launcher.parent.mkdir(parents=True)
    shutil.copy(TREE / "bin/sciexec", launcher)
    (tmp_path / "a place" / library / "sciexec").mkdir(parents=True)
    for room in (TREE / "sciexec").glob("*.py"):
        shutil.copy(room, tmp_path / "a place" / library / "sciexec")
    return launcher


PLACES = ["prefix", "lib64", "debian", "user", "target", "tree"]
INTERPRETER = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_the_launcher_finds_its_package_and_a_python(place: Path, tmp_path: Path) -> None:
    if not Path(INTERPRETER).exists():
        pytest.skip(f"needs {INTERPRETER}")
    link, chain = tmp_path / "link", tmp_path / "apptainer"
    link.symlink_to(place)
    chain.symlink_to("link")
    expected = f"sciexec version {package.__version__}\n"
    assert call(place, "--version").stdout == expected
    assert call("bin/sciexec", "--version", cwd=place.parent.parent).stdout == expected
    assert call("/bin/sh", "sciexec", "--version", cwd=place.parent).stdout == expected
    assert call("/bin/sh", "-c", "sciexec --version", env={"PATH": str(place.parent)}).stdout == expected
    assert call(link, "--version", env={"PATH": ""}, cwd="/").stdout == expected
    assert call(chain, "--version").stdout == f"apptainer version 1.4.5+sciexec.{package.__version__}\n"


@pytest.mark.parametrize("place", ["prefix"], indirect=True)
def test_the_launcher_prefers_the_python_it_was_installed_for(place: Path) -> None:
    """A second Python's package beside ours is not mixed with it."""
    for name in ("python3", f"python{sys.version_info.major}.{sys.version_info.minor}"):
        (place.parent / name).write_text(f"#!/bin/sh\necho {name}: $*\n")
        (place.parent / name).chmod(0o755)
    done = call(place, "exec", "a b")
    assert done.stdout.startswith(f"python{sys.version_info.major}.{sys.version_info.minor}: -ISc ")
    assert done.stdout.endswith("site-packages sciexec exec a b\n")


def test_as_a_module() -> None:
    done = call(sys.executable, "-m", "sciexec", "--version", cwd=TREE)
    assert done.stdout == f"sciexec version {package.__version__}\n"
    done = call(sys.executable, "-m", "sciexec", "exec", "/no/such", "x", cwd=TREE)
    assert done.returncode == 255
    assert call(sys.executable, "-m", "sciexec", "--help", cwd=TREE).stdout.startswith("Usage: sciexec ")
