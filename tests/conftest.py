"""What every test may use: the installed command, a small Debian tree, a small OCI layout, and the rules on what runs where.

A test runs the real thing or does not run.  On a laptop a missing program skips with its name; under CI=true a skip is a
failure, so that nothing is silently left out.  Tests marked root, gpu or peers are deselected where they do not belong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

CI = os.environ.get("CI") == "true"
TREE = Path(__file__).resolve().parent.parent


class Need(Protocol):
    def __call__(self, *programs: str) -> str: ...


class Command(Protocol):
    def __call__(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        input: str = "",
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]: ...


# --- what runs where ------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, never skip: a skip means that a test should have run here."""
    root = os.geteuid() == 0
    gpu = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))
    peers = "peers" in str(config.getoption("markexpr"))

    def belongs(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        return ("root" in marks) == root and (gpu or "gpu" not in marks) and (peers or "peers" not in marks)

    selected = [item for item in items if belongs(item)]
    if len(selected) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = selected


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why pytest skipped, from a report whose longrepr is (path, line, reason)."""
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"a skip is a failure under CI=true: {reason_of(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if CI and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"a skip is a failure under CI=true: {reason_of(report)}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests counted (record_property("counted", TEXT)): of suites of others, how much passes here."""
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    lines = [value for report in reports if report.when == "call" for name, value in report.user_properties if name == "counted"]
    if lines:
        terminalreporter.section("counted")
    for line in sorted(lines):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Leave the source tree: `python -c` and `-m` would import from it, and the tests are about what was installed."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


# --- programs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def need() -> Need:
    """need("umoci", "skopeo") -> the path of the first; skips where one is missing (a failure under CI)."""
    return find


def find(*programs: str) -> str:
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = {program: shutil.which(program, path=path) for program in programs}
    missing = [program for program in programs if not found[program]]
    if missing:
        pytest.skip(f"needs {' '.join(missing)} (recipes/packages.sh names the packages)")
    return str(found[programs[0]])


@pytest.fixture(scope="session")
def sciexec_path() -> Path:
    """The installed command: beside the interpreter that runs the tests."""
    path = Path(sys.executable).parent / "sciexec"
    assert path.is_file(), f"{path} is missing: run `pip install .` with {sys.executable}"
    return path


@pytest.fixture
def sciexec(sciexec_path: Path, tmp_path: Path) -> Command:
    """sciexec("exec", image, "true") -> CompletedProcess with text in stdout and stderr.

    The caller's own settings, credentials and cache stay out of it: HOME, caches and temporary files are the test's own.
    """
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)

    def run(
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        input: str = "",
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "USER", "LOGNAME") if name in os.environ}
        return subprocess.run(
            [str(sciexec_path), *map(str, arguments)],
            env={**kept, "HOME": str(home), "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), **(env or {})},
            cwd=cwd or home,
            input=input,
            text=True,
            errors="backslashreplace",
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    return run


# --- a small real system ----------------------------------------------------------------------------------------------------

# Debian packages of this host that make up the tree; every Debian has them (busybox-static: recipes/packages.sh).
PACKAGES = ("base-files", "busybox-static", "dash", "libc6", "libc-bin")
LEFT_OUT = ("/usr/share/", "/var/", "/usr/lib/locale/")
APPLETS = "cat chmod cp cut date echo env false find grep head id kill ln ls mkdir mount mv od ps pwd readlink realpath rm rmdir \
sed seq sleep sort stat sync tail tee test touch tr true tty umask uname wc whoami xargs".split()


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Debian tree of about 5 MB: dash as /bin/sh, busybox for the rest, the C library with its loader, users and groups.

    It is shared by the whole session: copy it before changing it.
    """
    find("dpkg-query", "busybox")
    root = tmp_path_factory.mktemp("rootfs") / "root"
    for directory in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "usr/local/bin", "etc", "root", "home", "opt", "srv", "var/tmp",
                      "tmp", "proc", "sys", "dev", "run", "mnt"):
        (root / directory).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):  # Debian's merged /usr
        (root / name).symlink_to(f"usr/{name}")
    listing = subprocess.run(["dpkg-query", "-L", *PACKAGES], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        source = Path(line)
        if not line.startswith("/") or line.startswith(LEFT_OUT) or "/gconv/" in line or source.is_dir() or not os.path.lexists(source):
            continue
        target = root / line.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(target) and (source.is_symlink() or os.access(source, os.R_OK)):
            shutil.copy2(source, target, follow_symlinks=False)
    for applet in APPLETS:
        if not os.path.lexists(root / "bin" / applet):
            (root / "bin" / applet).symlink_to("busybox")
    if not os.path.lexists(root / "bin/sh"):
        (root / "bin/sh").symlink_to("dash")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n")
    (root / "etc/group").write_text("root:x:0:\ndaemon:x:1:\n")
    (root / "tmp").chmod(0o1777)
    (root / "var/tmp").chmod(0o1777)
    yield root


@pytest.fixture(scope="session")
def oci_layout(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with one image, tag "app", made by umoci in five layers; created 2020-02-02T02:02:02Z.

    layer 1   the tree of `rootfs`
    layer 2   /opt/app: hello, a hard link to it (first), latest -> data, data/table; /srv/old, /srv/log/a, /srv/log/b
    3 and 4   whiteouts of /srv/old and of /srv/log/a
    layer 5   /opt/app/hello replaced; its other name keeps the old text

    ENTRYPOINT /opt/app/hello, CMD world, ENV GREETER="a layer", WORKDIR /opt/app, label org.opencontainers.image.title=app.
    """
    umoci = find("umoci")
    work = tmp_path_factory.mktemp("oci")
    layout, image = work / "layout", f"{work / 'layout'}:app"

    def make(*arguments: str | Path) -> None:
        subprocess.run([umoci, *map(str, arguments)], check=True, capture_output=True, text=True)

    def insert(source: Path, target: str) -> None:
        make("insert", "--rootless", "--image", image, source, target)

    make("init", "--layout", layout)
    make("new", "--image", image)
    insert(rootfs, "/")
    second = work / "second"
    (second / "opt/app/data").mkdir(parents=True)
    (second / "opt/app/latest").symlink_to("data")
    (second / "opt/app/data/table").write_text("1 2 3\n")
    hello = second / "opt/app/hello"
    hello.write_text('#!/bin/sh\necho "hello $* from $GREETER in $(pwd)"\n')
    hello.chmod(0o755)
    os.link(hello, second / "opt/app/first")
    for name in ("old", "log/a", "log/b"):
        (second / "srv" / name).parent.mkdir(parents=True, exist_ok=True)
        (second / "srv" / name).write_text(f"{name}\n")
    insert(second, "/")
    for gone in ("/srv/old", "/srv/log/a"):
        make("insert", "--rootless", "--image", image, "--whiteout", gone)
    replaced = work / "hello"
    replaced.write_text(hello.read_text().replace("hello", "good day"))
    replaced.chmod(0o755)
    insert(replaced, "/opt/app/hello")
    make(
        *("config", "--image", image, "--created", "2020-02-02T02:02:02Z", "--architecture", architecture()),
        *("--config.env", "PATH=/usr/local/bin:/usr/bin:/bin", "--config.env", "GREETER=a layer", "--config.workingdir", "/opt/app"),
        *("--config.entrypoint", "/opt/app/hello", "--config.cmd", "world", "--config.label", "org.opencontainers.image.title=app"),
    )
    return layout


def architecture() -> str:
    """This machine in the spelling of OCI (GOARCH)."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
