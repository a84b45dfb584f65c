"""What the payload sees: the rules as data, then the image's scripts in real shells, then real containers."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sciexec import environment
from sciexec.environment import DEFAULT_PATH, LIBRARIES, Start
from sciexec.errors import HostError, ImageError

# Text that would do something if any shell read it.
TRAPS = [
    "$(touch gone)",
    "`touch gone`",
    'a"b',
    "it's",
    "back\\slash",
    "new\nline",
    "!!",
    "a;b",
    "$HOME",
    "*",
    "~",
    "ünï",
    "\udce4",
    " ",
    "a  b",
    "x=y",
]

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
arguments = st.lists(text, max_size=5)
variables = st.lists(st.tuples(text.filter(lambda name: name and "=" not in name), text), max_size=5)


def plan(verb: str = "exec", argv: tuple[str, ...] = ("env",), /, **given: object) -> environment.Payload:
    defaults: dict[str, object] = {"host": {}, "start": Start([], [], []), "image": "/data/app.sif", "home": "/home/ann"}
    return environment.plan(verb, argv, **{**defaults, **given})  # type: ignore[arg-type]


def seen(env: list[tuple[str, str]] | None = None, /, **given: object) -> dict[str, str]:
    """What a payload of an image of ours, with ENV `env`, gets."""
    return plan(start=Start(env or [], [], []), **given).given


# --- the start object -------------------------------------------------------------------------------------------------------


def test_start_object_byte_for_byte() -> None:
    data = environment.dump(["A=1", "B=", "C", "=nameless", ""], ["/entry", ""], ["x y"])
    assert data == b"sciexec-start 1\0EA=1\0EB=\0EC=\0N/entry\0N\0Cx y\0"
    start = environment.load(data)
    assert (start.environment, start.entrypoint, start.command) == ([("A", "1"), ("B", ""), ("C", "")], ["/entry", ""], ["x y"])


@given(variables, arguments, arguments)
def test_start_object_survives_the_round_trip(env: list[tuple[str, str]], entrypoint: list[str], cmd: list[str]) -> None:
    start = environment.load(environment.dump([f"{name}={value}" for name, value in env], entrypoint, cmd))
    assert (start.environment, start.entrypoint, start.command) == (env, entrypoint, cmd)


def test_start_object_of_an_image_that_says_nothing() -> None:
    start = environment.load(environment.dump([], [], []))
    assert (start.environment, start.entrypoint, start.command) == ([], [], [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"sciexec-start 1",
        b"sciexec-start 2\0",
        b"sciexec-start 1\0EA=1",
        b"sciexec-start 1\0\0",
        b"sciexec-start 1\0EA\0",
        b"sciexec-start 1\0E=1\0",
        b"sciexec-start 1\0Xa\0",
        b"sciexec-start 1\0\xffa\0",
        b"sciexec-start 1\0Ca\0Nb\0",
        b"sciexec-start 1\0Na\0EA=1\0",
        b"sciexec-start 1\0C" + b"x" * environment.LARGEST_START + b"\0",
    ],
    ids=lambda data: repr(data[15:30]),
)
def test_malformed_start_object_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"app\.sif"):
        environment.load(data, "app.sif")


@given(st.binary(max_size=40))
def test_any_bytes_are_a_start_object_or_an_image_error(data: bytes) -> None:
    for candidate in (data, environment.MAGIC + data, environment.MAGIC + data + b"\0"):
        try:
            environment.load(candidate)
        except ImageError:
            pass


@pytest.mark.parametrize("value", ["nul\0", "\ud800"])
def test_what_execve_cannot_take_is_no_start_object(value: str) -> None:
    with pytest.raises(ImageError):
        environment.dump([f"A={value}"], [], [])


# --- host < image < user ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "image", "user", "expected"),
    [
        ("h", None, None, "h"),
        (None, "i", None, "i"),
        ("h", "i", None, "i"),
        ("h", "i", "u", "u"),
        ("h", None, "u", "u"),
        (None, "", None, ""),
        ("h", "", None, None),  # defined empty by the image: unset, as the peers do
        ("h", "i", "", ""),  # defined empty by the user: empty
        ("h", "", "", ""),
    ],
)
@pytest.mark.parametrize("prefix", ["SCIEXECENV_", "APPTAINERENV_", "SINGULARITYENV_", "--env"])
def test_who_wins(host: str | None, image: str | None, user: str | None, expected: str | None, prefix: str) -> None:
    environ = {} if host is None else {"X": host}
    env = []
    if user is not None and prefix == "--env":
        env = [("X", user)]
    elif user is not None:
        environ[f"{prefix}X"] = user
    assert seen([] if image is None else [("X", image)], host=environ, env=env).get("X") == expected


def test_the_users_prefixes_in_their_order() -> None:
    environ = {"SINGULARITYENV_X": "1", "APPTAINERENV_X": "2", "SCIEXECENV_X": "3"}
    for names, expected in ((["SINGULARITYENV_X"], "1"), (["SINGULARITYENV_X", "APPTAINERENV_X"], "2"), (list(environ), "3")):
        for order in itertools.permutations(names):
            assert seen(host={name: environ[name] for name in order})["X"] == expected
    assert seen(host=environ, env=[("X", "4"), ("X", "5")])["X"] == "5"


@pytest.mark.parametrize("value", TRAPS)
def test_values_are_data(value: str) -> None:
    assert seen([("X", value)])["X"] == value
    assert seen(env=[("X", value)])["X"] == value
    assert seen(host={"X": value})["X"] == value
    assert seen(host={"SINGULARITYENV_X": value})["X"] == value


def test_names_that_no_shell_takes_stay_outside_but_the_images_pass() -> None:
    odd = {"BASH_FUNC_ml%%": "() { :; }", "a.b": "1", "1X": "1", "ü": "1", "a b": "1"}
    assert not set(odd) & set(seen(host={**odd, "OK": "1"}))
    assert not set(odd) & set(seen(host={f"APPTAINERENV_{name}": value for name, value in odd.items()}))
    assert set(odd) <= set(seen(list(odd.items())))


def test_the_runtimes_own_variables() -> None:
    host = dict.fromkeys(("SINGULARITY_NAME", "APPTAINER_SHELL", "SCIEXEC_CACHEDIR", "SINGULARITY_OPTS", "APPTAINERENV_SECRET"), "host")
    inside = seen(host=host, bound="/a:/b,/c")
    ours = {name: value for name, value in inside.items() if name.startswith(("SCIEXEC", "APPTAINER", "SINGULARITY"))}
    expected = {"SCIEXEC_CONTAINER": "/data/app.sif", "SCIEXEC_NAME": "app.sif"}
    for prefix in ("APPTAINER", "SINGULARITY"):
        expected[f"{prefix}_CONTAINER"], expected[f"{prefix}_NAME"] = "/data/app.sif", "app.sif"
        expected[f"{prefix}_BIND"], expected[f"{prefix}_COMMAND"] = "/a:/b,/c", "exec"
        expected[f"{prefix}_ENVIRONMENT"] = "/.singularity.d/env/91-environment.sh"
    assert ours == expected
    assert inside["SECRET"] == "host"


def test_nobody_changes_home_and_what_tells_the_container() -> None:
    names = ("HOME", "SINGULARITY_NAME", "SCIEXEC_CONTAINER")
    for inside in (seen([(name, "x") for name in names]), seen(env=[(name, "x") for name in names])):
        assert inside["HOME"] == "/home/ann"
        assert inside["SINGULARITY_NAME"] == "app.sif"
        assert inside["SCIEXEC_CONTAINER"] == "/data/app.sif"


def test_under_another_name() -> None:
    inside = seen(program="/opt/bin/singularity", no_eval=True)
    assert {name for name in inside if name.startswith(("SCIEXEC", "APPTAINER"))} == set()
    assert (inside["PS1"], inside["SINGULARITY_NO_EVAL"]) == ("Singularity> ", "1")
    assert seen(program="apptainer")["PS1"] == "Apptainer> "
    assert seen(program="sciexec")["PS1"] == "sciexec> "


def test_cleanenv_as_cwltool_tests_it() -> None:
    host = {
        "PATH": "/x",
        "HOME": "/h",
        "FOO": "1",
        "TERM": "xterm",
        "HTTP_PROXY": "p",
        "no_proxy": "q",
        "PWD": "/",
        "SINGULARITYENV_TMPDIR": "/tmp",
    }
    inside = plan("run", (), host=host, cleanenv=True, no_eval=True, program="singularity").given
    told = {f"SINGULARITY_{key}" for key in ("CONTAINER", "NAME", "BIND", "ENVIRONMENT", "COMMAND", "NO_EVAL")}
    assert set(inside) == told | set("HOME LANG LD_LIBRARY_PATH PATH PS1 PROMPT_COMMAND TMPDIR TERM HTTP_PROXY no_proxy".split())
    assert (inside["LANG"], inside["SINGULARITY_COMMAND"], inside["SINGULARITY_BIND"]) == ("C", "run", "")


# --- search paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "user", "expected"),
    [
        (None, {}, DEFAULT_PATH),
        ("", {}, DEFAULT_PATH),
        ("/opt/bin", {}, f"/opt/bin:{DEFAULT_PATH}"),
        ("/opt/bin:/bin:/usr/bin", {}, "/opt/bin:/bin:/usr/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin"),
        ("/i", {"PATH": "/u"}, "/u"),
        ("/i", {"PATH": ""}, f"/i:{DEFAULT_PATH}"),
        ("/i", {"PREPEND_PATH": "/a", "APPEND_PATH": "/z"}, f"/a:/i:{DEFAULT_PATH}:/z"),
        ("/i", {"PATH": "/u", "PREPEND_PATH": "/a", "APPEND_PATH": "/z"}, "/a:/u:/z"),
        ("/i", {"PATH": "$PATH:/foo"}, f"/i:{DEFAULT_PATH}:/foo"),
        ("/i", {"PATH": "/foo:${PATH}"}, f"/foo:/i:{DEFAULT_PATH}"),
        ("/i", {"PATH": "/a:$PATH:/z"}, f"/a:/i:{DEFAULT_PATH}:/z"),
    ],
)
def test_path(image: str | None, user: dict[str, str], expected: str) -> None:
    env = [] if image is None else [("PATH", image)]
    host = {"PATH": "/host/bin"}
    assert seen(env, host=host, env=list(user.items()))["PATH"] == expected
    assert seen(env, host={**host, **{f"SINGULARITYENV_{name}": value for name, value in user.items()}})["PATH"] == expected


@pytest.mark.parametrize(
    ("image", "user", "expected"),
    [
        (None, {}, LIBRARIES),
        ("/opt/lib", {}, f"/opt/lib:{LIBRARIES}"),
        ("/opt/lib", {"LD_LIBRARY_PATH": "/u"}, "/u"),
        (None, {"PREPEND_LD_LIBRARY_PATH": "/a", "APPEND_LD_LIBRARY_PATH": "/z"}, f"/a:{LIBRARIES}:/z"),
    ],
)
def test_library_path(image: str | None, user: dict[str, str], expected: str) -> None:
    env = [] if image is None else [("LD_LIBRARY_PATH", image)]
    assert seen(env, host={"LD_LIBRARY_PATH": "/host/lib"}, env=list(user.items()))["LD_LIBRARY_PATH"] == expected


# --- the command ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "argv", "expected"),
    [
        (["/e", "a b"], ["c"], (), ["/e", "a b", "c"]),
        (["/e"], ["c"], ("$x", ""), ["/e", "$x", ""]),
        (["/e"], [], (), ["/e"]),
        ([], ["c", "d"], (), ["c", "d"]),
        ([], ["c", "d"], ("x",), ["x"]),
        ([], [], ("x",), ["x"]),
    ],
)
def test_run_joins_entrypoint_and_cmd_without_a_shell(
    entrypoint: list[str], cmd: list[str], argv: tuple[str, ...], expected: list[str]
) -> None:
    assert plan("run", argv, start=Start([], entrypoint, cmd)).command() == expected


def test_nothing_to_run() -> None:
    with pytest.raises(ImageError, match="neither ENTRYPOINT nor CMD"):
        plan("run", ()).command()


def test_exec_takes_no_notice_of_entrypoint_and_cmd() -> None:
    assert plan("exec", ("x",), start=Start([], ["/e"], ["c"])).command() == ["x"]


def test_shell_is_the_one_asked_for() -> None:
    assert plan("shell", ("-c", "x"), shell="/bin/zsh").command() == ["/bin/zsh", "-c", "x"]


@pytest.mark.parametrize(
    ("destination", "scripts"),
    [
        ("/.singularity.d", True),
        ("/.singularity.d/env/99-site.sh", True),
        ("/.singularity.d/runscript", True),
        ("/.singularity.d/libs", False),
        ("/.singularity.d/libs/libcuda.so.1", False),
        ("/.singularity.data", False),
        ("/data", False),
    ],
)
def test_a_bind_over_the_scripts_means_the_scripts(destination: str, scripts: bool) -> None:
    assert plan(start=Start([], [], []), binds=["/x", destination]).scripts is scripts
    assert plan(start=None, binds=[]).scripts


# --- what the caller gave us ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"LC_CTYPE": "C"}, {"LC_CTYPE": "C.UTF-8"}, {"LANG": "C", "X": "\udcff"}, {"LC_ALL": "C"}])
def test_host_is_what_the_caller_gave_in_every_locale(given: Mapping[str, str]) -> None:
    """In the C locale Python adds LC_CTYPE to its environment; a container must not see it."""
    program = f"import sys; sys.path.insert(0, {str(Path(environment.__file__).parent.parent)!r})\n"
    program += "from sciexec import environment; print(ascii(sorted(environment.host().items())))"
    done = subprocess.run([sys.executable, "-IS", "-c", program], env=dict(given), capture_output=True, text=True, check=True)
    assert done.stdout == f"{sorted(given.items())!a}\n"


# --- scripts, in real shells ------------------------------------------------------------------------------------------------

SHELLS = {"dash": "dash", "bash": "bash", "busybox": "busybox"}
Scripted = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(params=SHELLS)
def scripted(request: pytest.FixtureRequest, tmp_path: Path, need: Callable[..., str]) -> Scripted:
    """scripted({"90-x.sh": text}, *argv, host=..., env=...) runs the script that a container would, on files in tmp_path.

    It is started as "sh", as which bash is strict and busybox knows what it is.
    """
    shell = need(request.param)

    def run(files: dict[str, str], *argv: str, **given: object) -> subprocess.CompletedProcess[bytes]:
        folder = tmp_path / "env"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content)
        payload = plan("exec", argv, start=None, **given)
        _, *command = payload.script(argv)
        command[1] = command[1].replace("/.singularity.d/env", str(folder))
        return subprocess.run(
            ["sh", *command],
            executable=shell,
            env={**payload.own, "PATH": DEFAULT_PATH},
            cwd=tmp_path,
            capture_output=True,
            timeout=60,
            check=False,
        )

    return run


def variables_of(done: subprocess.CompletedProcess[bytes]) -> dict[str, str]:
    assert (done.returncode, done.stderr) == (0, b"")
    pairs = (entry.decode("utf-8", "surrogateescape").partition("=") for entry in done.stdout.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def test_scripts_follow_the_same_rule(scripted: Scripted) -> None:
    files = {
        "10-docker2singularity.sh": 'export A="${A:-image}" B="${B:-image}" EMPTY="${EMPTY:-}" NEW="${NEW:-}"\n',
        "90-environment.sh": "UNEXPORTED=1\n",
    }
    host = {
        "A": "host",
        "C": "host",
        "EMPTY": "host",
        "TERM": "xterm",
        "HOSTNAME": "node7",
        "PATH": "/host",
        "SHLVL": "4",
        "SINGULARITYENV_B": "user",
        "SINGULARITYENV_NO": "",
    }
    inside = variables_of(scripted(files, "env", "-0", host=host))
    assert (inside["A"], inside["B"], inside["C"], inside["NO"], inside["NEW"]) == ("image", "user", "host", "", "")
    assert (inside["TERM"], inside["HOSTNAME"]) == ("xterm", "node7")  # bash sets both by itself where they are missing
    assert not {"EMPTY", "UNEXPORTED"} & set(inside)
    assert not [name for name in inside if name.startswith("sciexec")]
    assert inside["PATH"] == DEFAULT_PATH
    assert inside["HOME"] == "/home/ann"
    assert inside["SINGULARITY_NAME"] == "app.sif"


def test_scripts_do_not_see_the_host(scripted: Scripted) -> None:
    inside = variables_of(
        scripted(
            {"90-x.sh": 'export SAW="${FOO-nothing} ${SINGULARITYENV_FOO-nothing} $SINGULARITY_NAME"\n'}, "env", "-0", host={"FOO": "1"}
        )
    )
    assert (inside["SAW"], inside["FOO"]) == ("nothing nothing app.sif", "1")


@pytest.mark.parametrize("value", [*TRAPS, "--", "--user"])
def test_values_are_data_in_scripts_too(scripted: Scripted, value: str, tmp_path: Path) -> None:
    inside = variables_of(scripted({}, "env", "-0", host={"H": value, "APPTAINERENV_U": value}, env=[("E", value)]))
    assert (inside["H"], inside["U"], inside["E"]) == (value, value, value)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("argument", [*TRAPS, "", "--", "--user", "A=1", "-x"])
def test_arguments_are_data_in_scripts_too(scripted: Scripted, argument: str) -> None:
    done = scripted({"90-x.sh": "set -- a b c; IFS=:\n"}, "printf", "%s|", "x", argument, host={"A": "1"})
    assert (done.stdout, done.stderr) == (b"x|" + os.fsencode(argument) + b"|", b"")


@pytest.mark.parametrize(
    ("files", "user", "expected"),
    [
        ({}, {}, DEFAULT_PATH),
        ({"90-x.sh": "PATH=/opt/bin:$PATH\n"}, {}, f"/opt/bin:{DEFAULT_PATH}"),
        (
            {"10-docker2singularity.sh": "export PATH='/opt/bin:/bin'\n"},
            {},
            "/opt/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin",
        ),
        ({"90-x.sh": "export PATH='/opt/bin:/bin:/usr/bin'\n"}, {}, "/opt/bin:/bin:/usr/bin"),
        ({"90-x.sh": "PATH=\n"}, {"PREPEND_PATH": "/a", "APPEND_PATH": "/z"}, f"/a:{DEFAULT_PATH}:/z"),
        ({"90-x.sh": "PATH=/i:/usr/bin\n"}, {"PATH": "$PATH:/foo"}, "/i:/usr/bin:/foo"),
        ({"90-x.sh": "PATH=/i\n"}, {"PATH": "/u:/usr/bin"}, "/u:/usr/bin"),
    ],
)
def test_path_in_scripts(scripted: Scripted, files: dict[str, str], user: dict[str, str], expected: str) -> None:
    done = scripted(files, "/usr/bin/env", "-0", host={"PATH": "/host"}, env=list(user.items()))
    assert variables_of(done)["PATH"] == expected


def test_library_path_in_scripts(scripted: Scripted) -> None:
    path = 'LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/.singularity.d/libs"\n'
    base = {"99-base.sh": path + 'PS1="Image> "; export LD_LIBRARY_PATH PS1\n'}
    host = {"LD_LIBRARY_PATH": "/host"}
    inside = variables_of(scripted({}, "env", "-0", host=host))
    assert (inside["LD_LIBRARY_PATH"], inside["PS1"]) == (LIBRARIES, "sciexec> ")
    env = [("PREPEND_LD_LIBRARY_PATH", "/a"), ("APPEND_LD_LIBRARY_PATH", "/z")]
    inside = variables_of(scripted({**base, "90-x.sh": "export LD_LIBRARY_PATH=/i\n"}, "env", "-0", host=host, env=env))
    assert (inside["LD_LIBRARY_PATH"], inside["PS1"]) == (f"/a:/i:{LIBRARIES}:/z", "Image> ")


def test_scripts_may_leave_the_shell_in_any_state(scripted: Scripted) -> None:
    files = {"90-x.sh": "set -aefu\nIFS=/\nreadonly LOCKED=1\nalias printf=false\nset -- -- --user\n"}
    inside = variables_of(scripted(files, "env", "-0", host={"LOCKED": "2", "UID": "5", "PPID": "6", "SHELLOPTS": "xtrace", "A": "1"}))
    assert inside["A"] == "1"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("nosuch", b'FATAL: "nosuch": executable file not found in $PATH\n'),
        ("cd", b'FATAL: "cd": executable file not found in $PATH\n'),  # a shell has it, the image not
        ("/no/such", b"FATAL: stat /no/such: no such file or directory\n"),
        ("/etc", b'FATAL: "/etc": permission denied\n'),
        ("/etc/passwd", b'FATAL: "/etc/passwd": permission denied\n'),
        ("", b'FATAL: "": executable file not found in $PATH\n'),
    ],
)
def test_a_missing_command_in_scripts(scripted: Scripted, command: str, message: bytes) -> None:
    done = scripted({}, command, host={"A": "1"})
    assert (done.returncode, done.stderr, done.stdout) == (255, message, b"")


def test_the_exit_code_is_the_commands_own(scripted: Scripted) -> None:
    assert scripted({}, "sh", "-c", "exit 37").returncode == 37
    assert scripted({}, "sh", "-c", "kill -9 $$").returncode == -9


def test_three_thousand_variables(scripted: Scripted) -> None:
    host = {f"V{number}": str(number) for number in range(3_000)}
    inside = variables_of(scripted({"90-x.sh": "export V7=image\n"}, "env", "-0", host=host))
    assert {name: value for name, value in inside.items() if name in host} == {**host, "V7": "image"}


# --- execve without a shell -------------------------------------------------------------------------------------------------


def execute(argv: list[str], env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path.insert(0, {str(Path(environment.__file__).parent.parent)!r})\n"
    program += "from sciexec import environment, errors\n"
    program += (
        f"try: environment.execute({argv!a}, {env!a})\nexcept errors.SciexecError as error: print(error.message); sys.exit(error.exit_code)"
    )
    return subprocess.run([sys.executable, "-IS", "-c", program], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["nosuch"], 255, '"nosuch": executable file not found in $PATH'),
        (["no\nsuch"], 255, '"no\\nsuch": executable file not found in $PATH'),
        ([""], 255, '"": executable file not found in $PATH'),
        (["/no/such"], 255, "stat /no/such: no such file or directory"),
        (["./plain"], 255, '"./plain": permission denied'),
        (["plain"], 255, '"plain": executable file not found in $PATH'),
        (["orphan"], 255, '"orphan": the interpreter that it names is not in the image'),
        (["text"], 255, '"text": exec format error'),
        (["true", "nul\0"], 255, '"true": embedded null byte'),
        (["true"], 0, ""),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_command_that_cannot_be_executed(argv: list[str], code: int, message: str, tmp_path: Path) -> None:
    for name, content, mode in (("plain", "x", 0o644), ("orphan", "#!/no/interpreter\n", 0o755), ("text", "hello\n", 0o755)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)
    done = execute(argv, {"PATH": f"{tmp_path}/none::{tmp_path}:/usr/bin"}, tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (code, message, "")


def test_more_than_the_kernel_takes() -> None:
    with pytest.raises(HostError, match="larger than the kernel takes"):
        environment.execute(["true", "x" * 200_000], {"PATH": "/usr/bin"})


def test_the_first_program_on_the_path_that_can_be_executed(tmp_path: Path) -> None:
    for name, mode in (("a", 0o644), ("b", 0o755), ("c", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program").write_text(f"#!/bin/sh\necho {name} $X\n")
        (tmp_path / name / "program").chmod(mode)
    done = execute(["program"], {"PATH": f"{tmp_path}/a:{tmp_path}/b:{tmp_path}/c", "X": "$Y"}, tmp_path)
    assert done.stdout == "b $Y\n"


# --- in containers ----------------------------------------------------------------------------------------------------------

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def sandbox(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with scripts as Apptainer writes them."""
    root = tmp_path_factory.mktemp("scripts") / "image"
    shutil.copytree(rootfs, root, symlinks=True)
    files = {
        "env/10-docker2singularity.sh": 'export PATH=\'/opt/bin:/bin\'\nexport IMAGE="${IMAGE:-"yes"}"\n',
        "env/90-environment.sh": 'export NAMED="$SINGULARITY_NAME"\n',
        "runscript": '#!/bin/sh\necho "runscript: $*, $IMAGE"\n',
    }
    for name, content in files.items():
        path = root / ".singularity.d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    return root


def test_an_image_with_scripts(sciexec: Command, sandbox: Path) -> None:
    done = sciexec("exec", sandbox, "env", env={"IMAGE": "host", "HOST": "$(id)", "SINGULARITYENV_USER_VALUE": "`id`"})
    assert (done.returncode, done.stderr) == (0, "")
    inside = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (inside["IMAGE"], inside["HOST"], inside["USER_VALUE"], inside["NAMED"]) == ("yes", "$(id)", "`id`", "image")
    assert inside["PATH"] == "/opt/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin"


def test_run_uses_the_runscript(sciexec: Command, sandbox: Path) -> None:
    assert sciexec("run", sandbox, "a", "b").stdout == "runscript: a b, yes\n"


def test_a_script_bound_over_the_images(sciexec: Command, sandbox: Path, tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("export SITE=1\n")
    done = sciexec("exec", "-B", f"{tmp_path}/site.sh:/.singularity.d/env/90-environment.sh", sandbox, "sh", "-c", "echo $SITE${NAMED-}")
    assert done.stdout == "1\n", done.stderr


def test_an_image_without_scripts_gets_its_environment_all_the_same(sciexec: Command, rootfs: Path) -> None:
    done = sciexec("exec", "--cleanenv", "--env", "X=$(id)", rootfs, "env", env={"FOO": "1"})
    inside = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert inside["PATH"] == DEFAULT_PATH
    assert (inside["LANG"], inside["X"]) == ("C", "$(id)")
    assert not {"FOO", "PWD", "LC_CTYPE"} & set(inside)


@pytest.mark.parametrize("image", ["sandbox", "rootfs"])
@pytest.mark.parametrize(
    ("command", "message"), [("nosuch", '"nosuch": executable file not found in $PATH'), ("/no", "stat /no: no such file or directory")]
)
def test_a_missing_command(sciexec: Command, image: str, command: str, message: str, request: pytest.FixtureRequest) -> None:
    done = sciexec("exec", request.getfixturevalue(image), command)
    assert (done.returncode, done.stdout, done.stderr) == (255, "", f"FATAL: {message}\n")


def test_an_image_without_any_shell(sciexec: Command, need: Callable[..., str], tmp_path: Path) -> None:
    """HTCondor probes with an image that holds one static binary and nothing else."""
    image = tmp_path / "tiny"
    (image / ".singularity.d/env").mkdir(parents=True)
    (image / ".singularity.d/env/90-environment.sh").write_text("export NEVER=1\n")
    shutil.copy(need("busybox"), image / "env")
    done = sciexec("exec", image, "/env")
    assert done.returncode == 0, done.stderr
    assert "PATH=" in done.stdout and "NEVER" not in done.stdout
    assert sciexec("exec", image, "true").stderr == 'FATAL: "true": executable file not found in $PATH\n'


def test_shell_reads_commands(sciexec: Command, rootfs: Path) -> None:
    done = sciexec("shell", rootfs, input="echo $((6 * 7)) $SINGULARITY_COMMAND; exit 5\n")
    assert (done.stdout, done.returncode) == ("42 shell\n", 5)
    assert sciexec("shell", "--shell", "/bin/cat", rootfs, input="read\n").stdout == "read\n"
    assert sciexec("shell", "-s", "/no/shell", rootfs).returncode == 255


def test_pwd_is_where_the_payload_starts(sciexec: Command, rootfs: Path) -> None:
    done = sciexec("exec", "--pwd", "/usr", rootfs, "env", env={"PWD": "/nowhere"})
    assert "PWD=/usr\n" in done.stdout
