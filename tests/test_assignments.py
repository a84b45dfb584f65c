"""Assignments: what a shell makes of the same text, without a shell; --env-file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sciexec import assignments
from sciexec.errors import HostError, SciexecError

Command = Callable[..., "subprocess.CompletedProcess[str]"]
HOST = {"HOME": "/home/ann", "HOSTVAR": "of the host", "PATH": "/bin"}


def read(path: Path, text: str, host: dict[str, str] = HOST) -> dict[str, str]:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return dict(assignments.read([str(path)], host))


# As Apptainer 1.4.5 has them (and every POSIX shell, but for the tilde behind a colon).
VALUES = {
    "": "",
    "1": "1",
    '"two words"': "two words",
    "'single $HOSTVAR'": "single $HOSTVAR",
    '"double $HOSTVAR"': "double of the host",
    "$HOSTVAR": "of the host",
    "${HOSTVAR}x$NOPE": "of the hostx",
    "${NOPE:-default}${HOSTVAR:+set}": "defaultset",
    "${NOPE-a}${NOPE=b}$NOPE": "abb",
    '${NOPE:-"a  }b"}': "a  }b",
    '"${NOPE:-a  b}"': "a  b",
    "${NOPE:-${ALSO:-$HOSTVAR}}": "of the host",
    '"a"b\'c\'': "abc",
    "a#b # a comment": "a#b",
    "#x": "#x",
    "~": "/home/ann",
    "~/x": "/home/ann/x",
    "a:~/b": "a:~/b",
    '"~"': "~",
    "*": "*",
    "a\\\nb": "ab",
    '"a\\\nb"': "ab",
    "a\\$b": "a$b",
    "a\\ b": "a b",
    '"a\\"b\\$c\\d\\\\"': 'a"b$c\\d\\',
    '"new\nline"': "new\nline",
    "'new\nline'": "new\nline",
    '"a\\}" ': "a\\}",
    '"${NOPE:-a\\}b}"': "a}b",
    "$": "$",
    "a=b": "a=b",
    "x; Y=2": "x",
    "ünï\udcff": "ünï\udcff",
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value(text: str, tmp_path: Path) -> None:
    for line in (f"X={text}", f"export X={text}\n", f"#!/bin/sh\n# comment\n\n \tX={text} \n", f"W=1 X={text}\nexport W"):
        assert read(tmp_path / "file", line)["X"] == VALUES[text]


@pytest.mark.parametrize("text", [text for text in VALUES if "~/b" not in text and "\udcff" not in text])
def test_a_shell_has_the_same_value(text: str, tmp_path: Path, need: Callable[..., str]) -> None:
    (tmp_path / "file").write_text(f"X={text}\n")
    script = '. "$1"; printf %s "$X"'
    done = subprocess.run([need("dash"), "-c", script, "sh", tmp_path / "file"], env=HOST, capture_output=True, check=True)
    assert os.fsdecode(done.stdout) == VALUES[text]


PIECES = ["a", " ", '"', "'", "\\", "$HOME", "${X:-", "}", "\n", ";", "#", "=", "~", "X=", "$NOPE", "~/", "é"]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_it_agrees_with_a_shell_or_refuses(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """What is read without a complaint is what dash reads."""
    path = tmp_path_factory.mktemp("any") / "file"
    try:
        found = read(path, f"X={text}\n")
    except SciexecError:
        return
    script = '. "$1"; printf "%s" "$X"'
    done = subprocess.run(["/bin/sh", "-c", script, "sh", path], env={"HOME": "/home/ann"}, capture_output=True, check=True)
    assert os.fsdecode(done.stdout) == found["X"]


def test_a_file_as_people_write_it(tmp_path: Path) -> None:
    text = "#!/bin/bash\nset -a\nA=1 B=$A\n\n  export C=3 D=4 # more\r\nPATH=/opt/bin:$PATH\nPATH+=:/end\n"
    text += "GONE=1\nunset GONE NEVER\nA=9; E=$A\nset +a"
    assert list(read(tmp_path / "file", text).items()) == [
        ("A", "9"), ("B", "1"), ("C", "3"), ("D", "4"), ("PATH", "/opt/bin:/bin:/end"), ("E", "9"),
    ]  # fmt: skip
    assert read(tmp_path / "file", "") == read(tmp_path / "file", "# nothing\n") == {}


def test_a_later_file_over_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("A=1\nB=1\n")
    (tmp_path / "2").write_text("B=$B.2\n")
    assert assignments.read([str(tmp_path / "1"), str(tmp_path / "2")], HOST) == [("A", "1"), ("B", "1.2")]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("A=1\nnot an assignment\n", 2, "not is a command"),
        ("A=1\nB=2 touch gone", 2, "touch is a command"),
        ("touch gone", 1, "touch is a command"),
        ("A=$(touch gone)", 1, r"\$\(\.\.\.\) is a command"),
        ('A="`touch gone`"', 1, r"`\.\.\.` is a command"),
        ("A=${B:-$(touch gone)}", 1, r"\$\(\.\.\.\) is a command"),
        ("A=1\n\nif true; then B=2; fi", 3, "if is a command"),
        ("A=1 > gone", 1, "> is a command"),
        ("A=x>gone", 1, "> outside of quotes"),
        ("A=1 & B=2", 1, "& is a command"),
        ("A=(1 2)", 1, r"\( outside"),
        ("A-B=x", 1, "A-B=x is a command"),
        ("1A=x", 1, "1A=x is a command"),
        ("A = x", 1, "A is a command"),
        ("A[1]=x", 1, r"A\[1\]=x is a command"),
        ('A="unclosed\nB=2\n', 1, 'a " is not closed'),
        ("A=1\nB='unclosed", 2, "a ' is not closed"),
        ("A=${B", 1, "only a name"),
        ("A=${B:-x", 1, "is not closed"),
        ("A=${#B}", 1, "only a name"),
        ("A=${B%x}", 1, "only a name"),
        ("A=$$", 1, r"only \$NAME"),
        ("A=$1", 1, r"only \$NAME"),
        ("export A-B", 1, "export takes names"),
        ("export -p", 1, "export takes names"),
        ("unset A=1", 1, "unset takes names"),
        ("set x", 1, "set takes flags"),
        (". other", 1, r"\. is a command"),
        ("A=\0", None, "NUL"),
        ("A=" + "x" * (4 << 20), None, "more than 4 MiB"),
    ],
)
def test_everything_else_is_refused_and_nothing_executed(text: str, line: int | None, what: str, tmp_path: Path) -> None:
    place = "" if line is None else f"line {line}: "
    with pytest.raises(SciexecError, match=rf"reading {tmp_path}/file.*{place}.*{what}"):
        read(tmp_path / "file", text)
    assert not (tmp_path / "gone").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path, cause in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(HostError, match=cause):
            assignments.read([str(path)], HOST)


def test_what_apptainer_writes_for_an_oci_image(tmp_path: Path) -> None:
    """Its escapes are those between double quotes; the rest of the script needs a shell."""
    (tmp_path / "runscript").write_text(
        "#!/bin/sh\nOCI_ENTRYPOINT='\"/busybox\" \"echo\"'\nOCI_CMD='\"a b\" \"\\$HOME \\\"q\\\" \\\\\" \"\"'\n"
        'if [ -n "$SINGULARITY_NO_EVAL" ]; then\n    exec "$@"\nfi\neval "set ${SINGULARITY_OCI_RUN}"\nexec "$@"\n'
    )
    assert assignments.oci(str(tmp_path / "runscript")) == (["/busybox", "echo"], ["a b", '$HOME "q" \\', ""])
    (tmp_path / "runscript").write_text("#!/bin/sh\nOCI_ENTRYPOINT='x'\nOCI_CMD=''\nexec other\n")
    assert assignments.oci(str(tmp_path / "runscript")) is None
    env = {
        "01-base.sh": "#!/bin/sh\n# nothing\n",
        "10-docker2singularity.sh": '#!/bin/sh\nexport PATH="/opt:/bin"\nexport A="${A:-"a \\$x \\"q\\""}"\nexport E="${E:-""}"\n',
        "90-environment.sh": "B=$HOME\nif true; then C=1; fi\n",
        "91-environment.sh": "D=$A\nA=later\n",
    }
    (tmp_path / "env").mkdir()
    for name, text in env.items():
        (tmp_path / "env" / name).write_text(text)
    assert assignments.image(str(tmp_path / "env"), HOST) == {"PATH": "/opt:/bin", "A": "later", "E": "", "D": 'a $x "q"'}
    assert assignments.image(str(tmp_path / "none"), HOST) == {}


def test_in_a_container(sciexec: Command, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("A=file\nB='two  words'\nHOME=/evil\nPREPEND_PATH=/pp\nC=$HOSTVAR\n")
    (tmp_path / "b").write_text("B=later\n")
    host = {"HOSTVAR": "seen", "SINGULARITYENV_A": "prefix", "SINGULARITYENV_D": "prefix"}

    def inside(*words: str, **env: str) -> dict[str, str]:
        done = sciexec("exec", *words, rootfs, "env", env={**host, **env}, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

    found = inside("--env-file", "a")
    assert (found["A"], found["B"], found["C"], found["D"]) == ("file", "two  words", "seen", "prefix")
    assert found["HOME"] != "/evil"
    assert found["PATH"].startswith("/pp:/usr/local/sbin:")
    for words in (["--env-file", "a", "--env-file=b"], ["--env-file", f"a,{tmp_path}/b"]):
        assert inside(*words)["B"] == "later"
    assert inside("--env", "A=option", "--env-file", "a")["A"] == "option"
    assert inside("--cleanenv", "--env-file", "a")["C"] == "seen"
    assert inside(APPTAINER_ENV_FILE="b")["B"] == "later"
    assert sciexec("exec", "--env-file", "/dev/stdin", rootfs, "sh", "-c", "echo $X", input="X=1\n").stdout == "1\n"
    done = sciexec("exec", "--env-file", "none", rootfs, "true", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (255, f"FATAL: reading {tmp_path}/none: No such file or directory\n")
    assert sciexec("exec", "--no-env", "HOSTVAR,X", rootfs, "sh", "-c", "echo ${HOSTVAR-none}", env=host).stdout == "none\n"
    assert sciexec("exec", rootfs, "sh", "-c", "echo ${X-none}", env={"X": "1", "APPTAINER_NOENV": "X"}).stdout == "none\n"
