"""What the payload sees: the rules as data, and how it is executed without a shell."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from environment_fixtures import TRAPS, plan
from hypothesis import given
from hypothesis import strategies as st

from sciexec import environment
from sciexec.environment import DEFAULT_PATH, LIBRARIES, Start
from sciexec.errors import HostError, ImageError

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
arguments = st.lists(text, max_size=5)
variables = st.lists(st.tuples(text.filter(lambda name: name and "=" not in name), text), max_size=5)


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
    inside = seen(host=host, bound=["/b", "/c"])
    ours = {name: value for name, value in inside.items() if name.startswith(("SCIEXEC", "APPTAINER", "SINGULARITY"))}
    expected = {"SCIEXEC_CONTAINER": "/data/app.sif", "SCIEXEC_NAME": "app.sif"}
    for prefix in ("APPTAINER", "SINGULARITY"):
        expected[f"{prefix}_CONTAINER"], expected[f"{prefix}_NAME"] = "/data/app.sif", "app.sif"
        expected[f"{prefix}_BIND"], expected[f"{prefix}_COMMAND"] = "/b,/c", "exec"
        expected[f"{prefix}_ENVIRONMENT"] = "/.singularity.d/env/91-environment.sh"
    assert ours == expected
    assert inside["SECRET"] == "host"


def test_nobody_changes_home_and_what_tells_the_container() -> None:
    names = ("HOME", "SINGULARITY_NAME", "SCIEXEC_CONTAINER")
    for inside in (seen([(name, "x") for name in names]), seen(env=[(name, "x") for name in names])):
        assert inside["HOME"] == "/home/ann"
        assert inside["SINGULARITY_NAME"] == "app.sif"
        assert inside["SCIEXEC_CONTAINER"] == "/data/app.sif"


def test_variables_that_stay_outside() -> None:
    host = {"FOO": "1", "BAR": "2", "BAZ": "3", "TERM": "xterm", "APPTAINERENV_FOO": "4"}
    inside = seen([("BAZ", "image")], host=host, no_env=["FOO", "BAR", "BAZ", "TERM"])
    assert (inside["FOO"], inside["BAZ"]) == ("4", "image")  # the user's own wish, and what the image says
    assert not {"BAR", "TERM"} & set(inside)
    assert "TERM" not in seen(host=host, no_env=["TERM"], cleanenv=True)
    given = plan(start=None, host=host, no_env=["BAR"]).scripts
    assert given and not [word for word in given.words if word.startswith("BAR=")]


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
        ("/i", {"PATH": "$PATHS:${PATHS}:/z"}, "$PATHS:${PATHS}:/z"),
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
        ("/opt/lib", {"LD_LIBRARY_PATH": "/u"}, f"/u:{LIBRARIES}"),
        ("/opt/lib", {"LD_LIBRARY_PATH": f"{LIBRARIES}:/u"}, f"{LIBRARIES}:/u"),
        ("/opt/lib", {"LD_LIBRARY_PATH": "/u:$LD_LIBRARY_PATH"}, f"/u:/opt/lib:{LIBRARIES}"),
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
    assert bool(plan(start=Start([], [], []), binds=["/x", destination]).scripts) is scripts
    assert plan(start=None, binds=[]).scripts


# --- what the caller gave us ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"LC_CTYPE": "C"}, {"LC_CTYPE": "C.UTF-8"}, {"LANG": "C", "X": "\udcff"}, {"LC_ALL": "C"}])
def test_host_is_what_the_caller_gave_in_every_locale(given: Mapping[str, str]) -> None:
    """In the C locale Python adds LC_CTYPE to its environment; a container must not see it."""
    program = f"import sys; sys.path.insert(0, {str(Path(environment.__file__).parent.parent)!r})\n"
    program += "from sciexec import environment; print(ascii(sorted(environment.host().items())))"
    done = subprocess.run([sys.executable, "-IS", "-c", program], env=dict(given), capture_output=True, text=True, check=True)
    assert done.stdout == f"{sorted(given.items())!a}\n"


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
