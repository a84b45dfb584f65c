"""Images whose scripts make the environment: the script that evaluates them, in real shells, then real containers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from environment_fixtures import TRAPS, plan

from convert import metadata
from sciexec.environment import DEFAULT_PATH, LIBRARIES

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
        scripts = plan("exec", argv, start=None, **given).scripts
        assert scripts
        _, *command = scripts.command(os.getuid(), list(argv))
        command[1] = command[1].replace("/.singularity.d/env", str(folder))
        return subprocess.run(
            ["sh", *command],
            executable=shell,
            env={**scripts.own, "PATH": DEFAULT_PATH},
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


@pytest.mark.parametrize("value", [*TRAPS, "--", "--user", "\\", "a\\", '\\"'])
def test_with_no_eval_values_are_data_in_scripts_too(scripted: Scripted, value: str, tmp_path: Path) -> None:
    env = [("E", value), ("PREPEND_PATH", value)]
    inside = variables_of(scripted({}, "/usr/bin/env", "-0", host={"H": value, "APPTAINERENV_U": value}, env=env, no_eval=True))
    assert (inside["H"], inside["U"], inside["E"], inside["PATH"]) == (value, value, value, f"{value}:{DEFAULT_PATH}")
    assert not (tmp_path / "gone").exists()


# What Apptainer 1.4.5 makes of --env X=VALUE, but for the four at the end, at which its evaluation stumbles.
EVALUATED = {
    "$IMAGE": "from script",
    "$HOST.": ".",  # the host's variables are not there yet
    "$HOME ${IMAGE}": "/home/ann from script",
    "${IMAGE:-d} ${NOPE:-d}": "from script d",
    "$(echo cmd)": "cmd",
    "`echo cmd`": "cmd",
    '$(echo "a  b")': '"a b"',
    "'$IMAGE'": "'from script'",
    '"$IMAGE"': '"from script"',
    "\\$IMAGE": "$IMAGE",
    "\\`id\\`": "`id`",
    "\\$(id)": "$(id)",
    "a\\b\\\\c\\$d": "a\\b\\c$d",
    "$((1+2))": "3",
    "$(exit 3)": "",
    'a"b': 'a"b',
    "a'b": "a'b",
    "new\nline $IMAGE": "new\nline from script",
    "$": "$",
    "~ * ! #": "~ * ! #",
    "$UID": str(os.getuid()),
    "a\\": "a\\",
    "\\\"q\\\"": '"q"',
    "a\\\\": "a\\",
    "$SINGULARITY_NAME": "app.sif",
}


@pytest.mark.parametrize("value", EVALUATED)
@pytest.mark.parametrize("how", ["--env", "SINGULARITYENV_"])
def test_the_users_values_are_evaluated_where_scripts_are(scripted: Scripted, value: str, how: str) -> None:
    host = {"HOST": "host", **({f"{how}X": value} if how != "--env" else {})}
    env = [("X", value)] if how == "--env" else []
    inside = variables_of(scripted({"90-x.sh": 'export IMAGE="from script"\n'}, "env", "-0", host=host, env=env))
    assert (inside["X"], inside["HOST"]) == (EVALUATED[value], "host")
    assert not {"UID", "sciexec_value"} & set(inside)


def test_a_value_sees_those_given_before_it_and_pieces_of_paths_are_evaluated_too(scripted: Scripted) -> None:
    env = [("A", "1"), ("B", "$A$A"), ("C", "$B$B"), ("PREPEND_PATH", "$HOME/bin"), ("APPEND_LD_LIBRARY_PATH", "$HOME/lib")]
    inside = variables_of(scripted({}, "env", "-0", env=env))
    assert (inside["A"], inside["B"], inside["C"]) == ("1", "11", "1111")
    assert inside["PATH"] == f"/home/ann/bin:{DEFAULT_PATH}"
    assert inside["LD_LIBRARY_PATH"] == f"{LIBRARIES}:/home/ann/lib"


@pytest.mark.parametrize("value", ["${", "$(", "`", "${NOPE:?never}", "$(("])
def test_a_value_that_no_shell_understands_is_named(scripted: Scripted, value: str) -> None:
    done = scripted({}, "env", env=[("FINE", "1"), ("X", value)])
    if done.returncode == 0:  # bash takes one half of them for an empty text
        assert b"X=\n" in done.stdout
        return
    assert (done.returncode, done.stdout) == (255, b"")
    assert done.stderr.splitlines()[-1] == b"FATAL: setting X: the shell of the image cannot evaluate the value"


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
        ({"90-x.sh": "PATH=/i\n"}, {"PATH": "/u:${PATH}:/usr/bin"}, "/u:/i:/usr/bin"),
        ({"90-x.sh": "PATH=/i\n"}, {"PATH": ""}, "/i"),
    ],
)
@pytest.mark.parametrize("no_eval", [False, True])
def test_path_in_scripts(scripted: Scripted, files: dict[str, str], user: dict[str, str], expected: str, no_eval: bool) -> None:
    done = scripted(files, "/usr/bin/env", "-0", host={"PATH": "/host"}, env=list(user.items()), no_eval=no_eval)
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
    for value, expected in (("/u", f"/u:{LIBRARIES}"), ("$LD_LIBRARY_PATH:/u", f"/i:{LIBRARIES}:/u"), (LIBRARIES, LIBRARIES)):
        inside = variables_of(scripted(base, "env", "-0", host=host, env=[("LD_LIBRARY_PATH", value)]))
        assert inside["LD_LIBRARY_PATH"] == expected


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
    assert (inside["IMAGE"], inside["HOST"], inside["NAMED"]) == ("yes", "$(id)", "image")
    assert inside["USER_VALUE"].startswith(f"uid={os.getuid()}")
    assert sciexec("exec", "--no-eval", "--env", "X=`id`", sandbox, "sh", "-c", 'echo "$X"').stdout == "`id`\n"
    assert sciexec("exec", "--env", "X=`id`", sandbox, "sh", "-c", 'echo "$X"', env={"SINGULARITY_NO_EVAL": "1"}).stdout == "`id`\n"
    assert inside["PATH"] == "/opt/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin"


def test_run_uses_the_runscript(sciexec: Command, sandbox: Path) -> None:
    assert sciexec("run", sandbox, "a", "b").stdout == "runscript: a b, yes\n"


def test_a_script_bound_over_the_images(sciexec: Command, sandbox: Path, tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("export SITE=1\n")
    done = sciexec("exec", "-B", f"{tmp_path}/site.sh:/.singularity.d/env/90-environment.sh", sandbox, "sh", "-c", "echo $SITE${NAMED-}")
    assert done.stdout == "1\n", done.stderr


def test_an_image_without_scripts_gets_its_environment_all_the_same(sciexec: Command, rootfs: Path) -> None:
    done = sciexec("exec", "--cleanenv", "--env", "X=1,Y=a b", rootfs, "env", env={"FOO": "1"})
    inside = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert inside["PATH"] == DEFAULT_PATH
    assert (inside["LANG"], inside["X"], inside["Y"]) == ("C", "1", "a b")
    assert not {"FOO", "PWD", "LC_CTYPE"} & set(inside)
    # its shell is asked where there is something to evaluate
    assert "X=/usr\n" in sciexec("exec", "--pwd", "/usr", "--env", "X=$(pwd)", rootfs, "env").stdout
    assert "X=$(pwd)\n" in sciexec("exec", "--no-eval", "--env", "X=$(pwd)", rootfs, "env").stdout


@pytest.mark.parametrize("image", ["sandbox", "rootfs"])
@pytest.mark.parametrize(
    ("command", "message"), [("nosuch", '"nosuch": executable file not found in $PATH'), ("/no", "stat /no: no such file or directory")]
)
def test_a_missing_command(sciexec: Command, image: str, command: str, message: str, request: pytest.FixtureRequest) -> None:
    done = sciexec("exec", request.getfixturevalue(image), command)
    assert (done.returncode, done.stdout, done.stderr) == (255, "", f"FATAL: {message}\n")


def test_an_image_without_any_shell(sciexec: Command, need: Callable[..., str], tmp_path: Path) -> None:
    """HTCondor probes with an image that holds one static binary and nothing else; Apptainer makes others of OCI images."""
    image = tmp_path / "tiny"
    files = {
        "env/10-docker2singularity.sh": 'export PATH="/opt"\nexport FROM_OCI="${FROM_OCI:-"it\\"s \\$HOME"}"\n'
        'export EMPTY="${EMPTY:-""}"\n',
        "env/90-environment.sh": "if true; then export NEVER=1; fi\n",
        "runscript": "#!/bin/sh\nOCI_ENTRYPOINT='\"/env\" \"echo\"'\nOCI_CMD='\"a b\" \"\\$HOME\"'\n"
        'if true; then exec "$@"; fi\neval "set ${SINGULARITY_OCI_RUN}"\n',
    }
    for name, text in files.items():
        (image / ".singularity.d" / name).parent.mkdir(parents=True, exist_ok=True)
        (image / ".singularity.d" / name).write_text(text)
    (image / ".singularity.d/runscript").chmod(0o755)
    shutil.copy(need("busybox"), image / "env")
    host = {"FROM_OCI": "host", "EMPTY": "host", "HOST": "host"}
    done = sciexec("exec", "--env", "X=$HOME,Y=1", image, "/env", env=host)  # nobody there to evaluate it
    assert (done.returncode, done.stderr) == (0, "")
    inside = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (inside["FROM_OCI"], inside["HOST"], inside["X"], inside["Y"]) == ('it"s $HOME', "host", "$HOME", "1")
    assert inside["PATH"] == f"/opt:{DEFAULT_PATH}"
    assert not {"NEVER", "EMPTY"} & set(inside)
    (image / "env").rename(image / "busybox")
    (image / "env").symlink_to("busybox")
    (image / ".singularity.d/runscript").write_text(files["runscript"].replace("/env", "/busybox"))
    assert sciexec("run", image).stdout == "a b $HOME\n"
    assert sciexec("run", image, "x  y", "$HOME").stdout == "x  y $HOME\n"
    assert sciexec("exec", image, "true").stderr == 'FATAL: "true": executable file not found in $PATH\n'
    (image / ".singularity.d/runscript").write_text("#!/bin/sh\nexec /busybox\n")
    done = sciexec("run", image)
    assert done.stderr == 'FATAL: "/.singularity.d/runscript": the interpreter that it names is not in the image\n'


def test_shell_reads_commands(sciexec: Command, rootfs: Path) -> None:
    done = sciexec("shell", rootfs, input="echo $((6 * 7)) $SINGULARITY_COMMAND; exit 5\n")
    assert (done.stdout, done.returncode) == ("42 shell\n", 5)
    assert sciexec("shell", "--shell", "/bin/cat", rootfs, input="read\n").stdout == "read\n"
    assert sciexec("shell", "-s", "/no/shell", rootfs).returncode == 255


def test_pwd_is_where_the_payload_starts(sciexec: Command, rootfs: Path) -> None:
    done = sciexec("exec", "--pwd", "/usr", rootfs, "env", env={"PWD": "/nowhere"})
    assert "PWD=/usr\n" in done.stdout


# --- applications -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scif(sandbox: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with two applications (Scientific Filesystem), as Apptainer lays them out; the second has nothing to run."""
    root = tmp_path_factory.mktemp("scif") / "image"
    shutil.copytree(sandbox, root, symlinks=True)
    files = {
        ".singularity.d/env/95-apps.sh": metadata.SCRIPTS[".singularity.d/env/95-apps.sh"],
        "scif/apps/foo/scif/env/90-environment.sh": "export FOO_ENV=foo\n",
        "scif/apps/foo/scif/runscript": '#!/bin/sh\necho "run $*, $SCIF_APPNAME in $SCIF_APPROOT, $FOO_ENV"\n',
        "scif/apps/foo/scif/test": '#!/bin/sh\necho "test $*"; exit 3\n',
        "scif/apps/foo/bin/tool": "#!/bin/sh\necho tool of foo\n",
        "scif/apps/bar/scif/env/90-environment.sh": "",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    return root


def test_an_application(sciexec: Command, scif: Path) -> None:
    done = sciexec("run", "--app", "foo", scif, "a", "b")
    assert (done.stdout, done.stderr) == ("run a b, foo in /scif/apps/foo, foo\n", "")
    assert sciexec("run", scif, "a", env={"APPTAINER_APP": "foo"}).stdout.startswith("run a, foo")
    assert sciexec("run", scif, "a", env={"SINGULARITY_APPNAME": "foo"}).stdout.startswith("run a, foo")
    assert sciexec("exec", "--app", "foo", scif, "tool").stdout == "tool of foo\n"
    assert sciexec("shell", "--app", "foo", scif, input="echo $FOO_ENV $SCIF_APPDATA\n").stdout == "foo /scif/data/foo\n"
    done = sciexec("test", "--app=foo", scif, "x")
    assert (done.returncode, done.stdout) == (3, "test x\n")
    inside = dict(line.split("=", 1) for line in sciexec("exec", "--app", "foo", scif, "env").stdout.splitlines())
    assert inside["PATH"].startswith("/scif/apps/foo/bin:/scif/apps/foo:")
    assert inside["LD_LIBRARY_PATH"].split(":")[0] == "/scif/apps/foo/lib"
    assert inside["SINGULARITY_APPNAME"] == inside["APPTAINER_APPNAME"] == "foo"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exec", "--app", "nosuch", "true"], "the image has no application nosuch"),
        (["run", "--app", "bar"], "the application bar has no runscript"),
        (["test", "--app", "bar"], "the application bar has no test"),
        (["exec", "--app", "../foo", "true"], "--app ../foo: not the name of an application"),
    ],
)
def test_an_application_that_is_not_there(sciexec: Command, scif: Path, words: list[str], message: str) -> None:
    done = sciexec(*words[:3], scif, *words[3:])
    assert (done.returncode, done.stdout) == (1 if "/" in words[2] else 255, "")
    assert done.stderr.splitlines()[0] == f"FATAL: {message}"


# --- test -------------------------------------------------------------------------------------------------------------------


def test_an_image_with_a_test_and_one_without(sciexec: Command, sandbox: Path, rootfs: Path, tmp_path: Path) -> None:
    """HTCondor asks so before every job, and an image without a test must pass."""
    for words in (["test", rootfs], ["-s", "-q", "test", "--contain", "--cleanenv", sandbox]):
        done = sciexec(*words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "The image has no test.\n", "")
    script = tmp_path / "test"
    script.write_text('#!/bin/sh\necho "testing $# $IMAGE"\nexit 4\n')
    script.chmod(0o755)
    done = sciexec("test", "-B", f"{script}:/.singularity.d/test", sandbox, "1", "2")
    assert (done.returncode, done.stdout, done.stderr) == (4, "testing 2 yes\n", "")
