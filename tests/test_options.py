"""The command line of a run, in every spelling that people and workflow engines use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sciexec import cli, options, spelling
from sciexec.errors import HostError, SciexecError, UsageError
from sciexec.options import ACTIONS, ALWAYS, FLAG, LATER, LIST, NEVER, OPTIONS, READY, RUNS, Option, Options
from sciexec.spelling import Bind


def parsed(line: str | list[str], environ: Mapping[str, str] | None = None) -> Options:
    words = line.split() if isinstance(line, str) else line
    found = options.parse("sciexec", words, environ or {})
    assert found is not None, f"{line} is not plain"
    return found


def state(found: Options) -> dict[str, object]:
    return {slot: getattr(found, slot) for slot in Options.__slots__}


def clicked(words: list[str]) -> Options:
    found = cli.main("sciexec", words)
    assert isinstance(found, Options)
    return found


# --- the forms of a flag ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("exec i c", {"verb": "exec", "image": "i", "argv": ["c"], "binds": [], "home": None, "cwd": None, "quiet": False}),
        ("run i", {"verb": "run", "argv": []}),
        ("shell i", {"verb": "shell"}),
        ("exec -e -c i c", {"cleanenv": True, "contain": True}),
        ("exec -ec i c", {"cleanenv": True, "contain": True}),
        ("exec -ecB/a i c", {"cleanenv": True, "contain": True, "binds": [Bind("/a", "/a", False)]}),
        ("exec --cleanenv=true --contain=0 i c", {"cleanenv": True, "contain": False}),
        ("exec --contain --contain=false i c", {"contain": False}),
        ("exec -e=f i c", {"cleanenv": False}),
        ("exec -B/a:/b i c", {"binds": [Bind("/a", "/b", False)]}),
        ("exec -B /a:/b i c", {"binds": [Bind("/a", "/b", False)]}),
        ("exec -B=/a:/b i c", {"binds": [Bind("/a", "/b", False)]}),
        ("exec --bind=/a:/b i c", {"binds": [Bind("/a", "/b", False)]}),
        ("exec --bind /a:/b:ro --bind /c i c", {"binds": [Bind("/a", "/b", True), Bind("/c", "/c", False)]}),
        ("exec --pwd /a i c", {"cwd": "/a"}),
        ("exec --cwd=/a --pwd=/b i c", {"cwd": "/b"}),
        ("exec -H /a i c", {"home": ("/a", "/a")}),
        ("-q exec i c", {"quiet": True}),
        ("--quiet --silent exec i c", {"quiet": True}),
        ("-s exec i c", {"quiet": True}),
        ("exec -s i c", {"quiet": True}),
        ("exec -d i c", {"debug": True, "quiet": False}),
        ("-vd --nocolor exec i c", {"debug": True, "verbose": True, "nocolor": True}),
        ("shell -s /bin/zsh i", {"shell": "/bin/zsh", "quiet": False}),
        ("-s shell --shell=/bin/zsh i", {"shell": "/bin/zsh", "quiet": True}),
        ("exec --userns -u --no-eval --no-init i c", {"no_eval": True}),
        ("exec --writable-tmpfs --no-home --no-https --disable-cache i c", {"writable_tmpfs": True, "no_home": True, "no_https": True}),
        ("exec --arch arm64 --authfile=a.json i c", {"arch": "arm64", "authfile": "a.json"}),
        # all behind the image is the payload's
        ("exec i -B /a --nv --help", {"argv": ["-B", "/a", "--nv", "--help"], "binds": []}),
        ("run i --version", {"argv": ["--version"]}),
        ("exec i -- c", {"argv": ["--", "c"]}),
        ("exec -- -i c", {"image": "-i", "argv": ["c"]}),
        ("exec -e - c", {"image": "-"}),
    ],
)
def test_forms(line: str, expected: dict[str, object]) -> None:
    found = state(parsed(line))
    assert {slot: found[slot] for slot in expected} == expected


@pytest.mark.parametrize(
    "line",
    """
    exec|exec i|run|--help|exec --help|exec -h i c|pull x|exec --nosuch i c|exec -x i c|exec --bind|-B /a exec i c
    exec --cleanenv=maybe i c|exec --pwd|exec --|--config f exec i c|--|-||exec --cleanenvx i c|exec -ex i c
    """.replace("\n", "|").split("|"),
)
def test_whatever_is_not_plain_is_left_to_click(line: str) -> None:
    assert options.parse("sciexec", line.split(), {}) is None


@pytest.mark.parametrize("verb", ACTIONS)
def test_every_option_is_known_or_refused_by_its_name(verb: str) -> None:
    for row in options.rows(verb):
        for name in row.names:
            words = [verb, name, *(ALONE.get(row.slot, []) if row.kind == FLAG else VALUES.get(row.slot, ["/x=y"])[:1]), "i", "c"]
            found = options.parse("sciexec", words, {})
            assert (found is None) == (row.state in (LATER, NEVER)), words
            if found is None and verb in cli.commands.commands:
                why = "cannot be had without privileges: ." if row.state == NEVER else "is an option of Apptainer that this release"
                with pytest.raises(UsageError, match=f"^{row.names[0]} {why}"):
                    cli.main("sciexec", words)


def test_no_two_options_of_a_verb_share_a_name_or_a_variable() -> None:
    for verb in ("global", *RUNS):
        names = [name for row in options.rows(verb) for name in row.names]
        keys = [key for row in options.rows(verb) for key in row.keys]
        assert len(names) == len(set(names))
        assert len(keys) == len(set(keys))


def test_every_ready_option_has_a_place_and_a_line_of_help() -> None:
    for row in OPTIONS:
        assert row.state in (READY, ALWAYS, LATER, NEVER)
        if row.state == READY:
            assert row.help
            assert row.slot in Options.__slots__ or row.slot in GATHERED
            assert (row.kind == FLAG) == (row.metavar == "")


# into other slots
GATHERED = ("bind", "mount", "env_file", "network", "overlay", "security", "fusemount", *(row.slot for row in options.LIMITS))


# --- two readers, one meaning -----------------------------------------------------------------------------------------------


# values of options that do not take any text
VALUES = {
    "share": ["step", "off"],
    "bind": ["/a", "/a:/b:ro,/c,", "/x\\,y"],
    "mount": ["type=bind,src=/a,dst=/b", 'src=/a,"dst=/b,c",ro'],
    "data": ["/a", "/a:/b,c"],
    "home": ["/h", "/h:/i"],
    "no_mount": ["tmp", "cwd,/etc/hosts"],
    "scratch": ["/s", "/s,/t"],
    "dns": ["10.0.0.1", "10.0.0.1,fe80::1"],
    "env": ["A=1", "A=1,B=2"],
    "hostname": ["box", "node-1.example.org"],
    "network": ["none"],
    "security": ["uid:5", "gid:0"],
    "add_caps": ["CAP_CHOWN", "all"],
    "drop_caps": ["chown,CAP_KILL", "ALL"],
    "memory": ["1g"],
    "memory_swap": ["2G", "-1"],
    "memory_reservation": ["100m"],
    "cpus": ["1.5"],
    "cpu_shares": ["512"],
    "cpuset_cpus": ["0", "0-3,8"],
    "cpuset_mems": ["0"],
    "pids_limit": ["100"],
    "blkio_weight": ["500"],
    "overlay": ["/a", "/a:ro,b"],
    "tmpfs_size": ["1m", "4096"],
    "fusemount": ["host:a b /c"],
}
# flags that mean nothing alone
ALONE = {"net": ["--network=none"]}


def spellings(row: Option) -> st.SearchStrategy[list[str]]:
    """Ways to write an option that both readers take."""
    values = VALUES.get(row.slot, ["/v", "-v", "a b"])
    ways = []
    for name in row.names:
        if row.kind == FLAG:
            ways.append([name, *ALONE.get(row.slot, [])])
            continue
        for value in values:
            ways.append([name, value])
            ways.append([f"{name}={value}"] if name.startswith("--") else [f"{name}{value}"])
    return st.sampled_from(ways)


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    verb = draw(st.sampled_from(ACTIONS))

    def some(where: str) -> list[str]:
        rows = [row for row in options.rows(where) if row.state not in (LATER, NEVER)]
        return [word for row in draw(st.lists(st.sampled_from(rows), max_size=4)) for word in draw(spellings(row))]

    behind = draw(st.lists(st.sampled_from(["c", "-e", "--nv", "--", "", "--help", "-B"]), min_size=1, max_size=4))
    return [*some("global"), verb, *some(verb), draw(st.sampled_from(["image.sif", "./a:1.0", "/d"])), *behind]


@given(lines())
def test_click_and_the_fast_reader_agree(words: list[str]) -> None:
    assert state(parsed(words, os.environ)) == state(clicked(words))


@given(
    st.lists(
        st.sampled_from("exec run shell -e -ec -B -B/a --bind --bind= --pwd=/ --nv -s -q -- - = i c --env A=1 --help".split()), max_size=7
    )
)
def test_what_the_fast_reader_takes_click_takes_too(words: list[str]) -> None:
    try:
        fast = options.parse("sciexec", words, os.environ)
    except SciexecError:
        return
    if fast is not None:
        assert state(fast) == state(clicked(words))


# --- binds ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a", [Bind("/a", "/a", False)]),
        ("/a:/b", [Bind("/a", "/b", False)]),
        ("/a:/b:ro", [Bind("/a", "/b", True)]),
        ("/a:/b:rw", [Bind("/a", "/b", False)]),
        ("/a:/b:", [Bind("/a", "/b", False)]),
        ("/a:", [Bind("/a", "/a", False)]),
        ("/a::ro", [Bind("/a", "/a", True)]),
        ("/a,/b:/c", [Bind("/a", "/a", False), Bind("/b", "/c", False)]),
        ("/a,,/b,", [Bind("/a", "/a", False), Bind("/b", "/b", False)]),
        ("/a:/b:ro,rw", [Bind("/a", "/b", False)]),
        ("/a:/b:rw,ro,/c", [Bind("/a", "/b", True), Bind("/c", "/c", False)]),
        ("", []),
        (",", []),
        (r"/a\,b:/c\:d", [Bind("/a,b", "/c:d", False)]),
        (r"/a\:b", [Bind("/a:b", "/a:b", False)]),
        (r"/a\b", [Bind("/a\\b", "/a\\b", False)]),
        ("/a/..:/b", [Bind("/a/..", "/b", False)]),
        ("/a//b/../c/:/d//e/../f/.", [Bind("/a//b/../c/", "/d/f", False)]),
        ("//a", [Bind("//a", "/a", False)]),
        ("/a b:/c d", [Bind("/a b", "/c d", False)]),
    ],
)
def test_binds(text: str, expected: list[Bind]) -> None:
    assert spelling.binds(text) == expected


def test_a_relative_source_is_seen_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert spelling.binds("a") == [Bind(f"{tmp_path}/a", f"{tmp_path}/a", False)]
    # .. is left to the kernel, as it may stand behind a link; what is mounted upon is a plain path
    assert spelling.binds("../x") == [Bind(f"{tmp_path}/../x", f"{tmp_path.parent}/x", False)]
    assert spelling.binds("ro") == [Bind(f"{tmp_path}/ro", f"{tmp_path}/ro", False)]
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert spelling.binds("/a") == [Bind("/a", "/a", False)]
    with pytest.raises(HostError, match="current directory is gone"):
        spelling.binds("a")


@pytest.mark.parametrize("text", ["/a:b", "/a:/", "/", "/a:/b/..", "/a:/b:ro:rw", "/a:/b:xx", ":/b", "/a:/b:id=0", "/a:/b:id=x", "/a,b:c"])
def test_binds_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="^--bind "):
        spelling.binds(text)


@given(st.text("ab/:,\\. ro"))
def test_any_text_is_binds_or_a_usage_error(text: str) -> None:
    try:
        found = spelling.binds(text)
    except UsageError:
        return
    assert all(bind.source.startswith("/") and bind.target.startswith("/") and not bind.target.startswith("//") for bind in found)


# --- home, env --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("/a", ("/a", "/a")), ("/a:/b", ("/a", "/b")), ("/a/:/b/", ("/a/", "/b"))])
def test_home(text: str, expected: tuple[str, str]) -> None:
    assert parsed(["exec", "--home", text, "i", "c"]).home == expected


@pytest.mark.parametrize("text", ["/a:b", "/a:/b:/c", ":/b", "/a:"])
def test_homes_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="^--home "):
        parsed(["exec", "--home", text, "i", "c"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1", [("A", "1")]),
        ("A=", [("A", "")]),
        ("A=1,B=2", [("A", "1"), ("B", "2")]),
        ("A=1,2", [("A", "1,2")]),  # with one "=" there is nothing to separate
        ('"A=1,2"', [("A", "1,2")]),
        ('"A=1,2",B=3', [("A", "1,2"), ("B", "3")]),
        ('"A=a ""b"" c=d",B=3', [("A", 'a "b" c=d'), ("B", "3")]),
        ('A="x"', [("A", '"x"')]),
        ("A=$HOME `id`", [("A", "$HOME `id`")]),
        ("A=1\n2", [("A", "1\n2")]),
        ("A=b=c", [("A", "b=c")]),
    ],
)
def test_env(text: str, expected: list[tuple[str, str]]) -> None:
    assert parsed(["exec", "--env", text, "i", "c"]).env == expected


@pytest.mark.parametrize("text", ["A", "", "=1", "A=1,B=2,C", 'x"A=1,B=2', '"A=1,B=2', '"A=1"x,B=2', "A=\0"])
def test_env_that_makes_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="--env "):
        parsed(["exec", "--env", text, "i", "c"])


def test_env_keeps_its_order() -> None:
    assert parsed("exec --env A=1 --env B=2,A=3 i c").env == [("A", "1"), ("B", "2"), ("A", "3")]


# --- variables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SINGULARITY_CONTAIN": "1"}, {"contain": True}),
        ({"SINGULARITY_CONTAIN": "false"}, {"contain": False}),
        ({"SINGULARITY_CONTAIN": ""}, {"contain": False}),
        ({"APPTAINER_CONTAIN": "0", "SINGULARITY_CONTAIN": "1"}, {"contain": False}),
        ({"SCIEXEC_CONTAIN": "1", "APPTAINER_CONTAIN": "0"}, {"contain": True}),
        ({"APPTAINER_CONTAIN": "", "SINGULARITY_CONTAIN": "1"}, {"contain": True}),
        ({"SINGULARITY_HOME": "/a:/b"}, {"home": ("/a", "/b")}),
        ({"APPTAINER_TARGET_PWD": "/p"}, {"cwd": "/p"}),
        ({"SINGULARITY_BINDPATH": "/etc,/media"}, {"binds": [Bind("/etc", "/etc", False), Bind("/media", "/media", False)]}),
        ({"SINGULARITY_BIND": "/a", "APPTAINER_BINDPATH": "/b"}, {"binds": [Bind("/a", "/a", False), Bind("/b", "/b", False)]}),
        ({"SINGULARITY_SHELL": "/bin/zsh"}, {"shell": None}),  # of `shell` only
        ({"SINGULARITY_NV": "0", "SINGULARITY_OPTS": "x", "SINGULARITY_CACHEDIR": "/c", "APPTAINER_TEMPDIR": "/t"}, {}),
        ({"SINGULARITYENV_CONTAIN": "1", "CONTAIN": "1"}, {"contain": False}),
    ],
)
def test_variables(environ: dict[str, str], expected: dict[str, object]) -> None:
    found = state(parsed("exec i c", environ))
    assert {slot: found[slot] for slot in expected} == expected


def test_the_command_line_beats_a_variable_and_binds_are_put_together() -> None:
    environ = {"SINGULARITY_CONTAIN": "1", "SINGULARITY_HOME": "/a", "SINGULARITY_BIND": "/b"}
    found = parsed("exec --contain=false --home /h -B /c i c", environ)
    assert (found.contain, found.home) == (False, ("/h", "/h"))
    assert found.binds == [Bind("/c", "/c", False), Bind("/b", "/b", False)]
    assert parsed("shell i", {"SINGULARITY_SHELL": "/bin/zsh"}).shell == "/bin/zsh"


@pytest.mark.parametrize(("name", "value", "option"), [("APPTAINER_NV", "1", "--nv"), ("SINGULARITY_PLATFORM", "/w", "--platform")])
def test_a_variable_of_an_option_that_is_not_there_is_refused(name: str, value: str, option: str) -> None:
    with pytest.raises(UsageError, match=rf"^{name} \(which means {option}\)"):
        parsed("exec i c", {name: value})


def test_a_variable_that_is_neither_true_nor_false() -> None:
    with pytest.raises(UsageError, match="^SINGULARITY_CONTAIN=maybe: neither true nor false"):
        parsed("exec i c", {"SINGULARITY_CONTAIN": "maybe"})


# --- lines that engines write -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["exec", "--home", "/w", "--bind", "/s:/mnt/snakemake_searchpaths/item_0", "--pwd", "/w", "i.simg", "bash", "-c", "x -q"],
            {"cwd": "/w"},
        ),
        (["exec", "--env", "K=V,K2=V2", "--cwd", "/w", "--bind", "tmp:/tmp", "i", "sh", "-c", "x"], {"env": [("K", "V"), ("K2", "V2")]}),
        (["exec", "-B/a:/b", "-B/stage:/rfm_workdir", "--pwd", "/rfm_workdir", "i", "c"], {"cwd": "/rfm_workdir"}),
        (
            ["-s", "exec", "--contain", "--pwd", "/d", "--cleanenv", "-B", "/a:/b:ro", "--home", "/h:/h", "i", "c"],
            {"quiet": True, "contain": True},
        ),
        (
            ["exec", "--cleanenv", "--home=/d", "--bind=/a,/b,", "i", "sh", "s"],
            {"binds": [Bind("/a", "/a", False), Bind("/b", "/b", False)]},
        ),
        (["exec", "--cleanenv", "-B", "/a:/a", "-B", "/a:/a", "i", "/s.sh"], {"binds": [Bind("/a", "/a", False)]}),
        (["exec", "--userns", "hello.simg", "true"], {"argv": ["true"]}),
        (["exec", "-B", "/c:/mnt/pydra/c:rw", "--pwd", "/mnt/pydra", "name:tag", "c"], {"image": "name:tag"}),
        (["exec", "-e", "--bind", "/h:/c", "i", "sh", "-c", "c"], {"cleanenv": True}),
    ],
)
def test_lines_of_workflow_engines(words: list[str], expected: dict[str, object]) -> None:
    found = state(parsed(words))
    assert {slot: found[slot] for slot in expected} == expected


def test_a_file_comes_before_a_uri_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("docker:x", "sha256:0", "plain"):
        (tmp_path / name).touch()
    for image, remote in (("docker:x", False), ("plain", False), ("gone", False), ("/a:b", False), ("C:x", False)):
        assert parsed(["exec", image, "c"]).is_remote() is remote
    for image in ("docker://x", "oci:/d:tag", "docker-archive:/f"):
        assert parsed(["exec", image, "c"]).is_remote()
    assert parsed("exec instance://n c").is_instance()


def test_describe_keeps_the_secrets() -> None:
    line = parsed("exec --env TOKEN=secret -B /a i c").describe()
    assert "TOKEN" in line and "/a" in line and "secret" not in line


def test_what_may_be_given_several_times() -> None:
    several = "bind mount data no_mount scratch env env_file no_env overlay security fusemount"
    assert {row.slot for row in OPTIONS if row.kind == LIST} == set(several.split())
