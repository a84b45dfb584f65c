"""What `pip install` puts where: a wheel built of this tree, installed into an environment with nothing else in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build writes into its tree."""
    work = tmp_path_factory.mktemp("wheel")
    away = shutil.ignore_patterns(".git", ".*_cache", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".hypothesis")
    shutil.copytree(TREE, work / "tree", ignore=away, symlinks=True)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", work, work / "tree")
    (found,) = work.glob("sciexec-*.whl")
    return found


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment that holds sciexec and none of its dependencies."""
    place = tmp_path_factory.mktemp("bare") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", place)
    (packages,) = place.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "--quiet", f"--python={place / 'bin/python3'}", "install", "--no-deps", "--no-index", wheel)
    assert (packages / "sciexec").is_dir()
    return place / "bin"


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = {str(path.relative_to(TREE)) for package in ("sciexec", "convert") for path in (TREE / package).rglob("*.py")}
    expected |= {"sciexec/py.typed", "convert/py.typed", "sciexec/sciexec.conf"}
    compiled = [name for name in names if name.startswith("sciexec/_pysquashfs.") and name.endswith(".so")]
    (script,) = (name for name in names if ".data/scripts/" in name)
    assert len(compiled) == 1
    assert set(names) == expected | {compiled[0], script, "sciexec/sciexec-fuse"}
    assert script.endswith("/sciexec")


def test_the_launcher_is_the_shell_script_of_the_tree_beside_python(bare: Path) -> None:
    launcher = bare / "sciexec"
    assert launcher.read_bytes() == (TREE / "bin/sciexec").read_bytes()  # pip rewrites the first line of Python scripts only
    assert launcher.stat().st_mode & 0o777 == 0o755
    assert (bare / "python3").exists()


@pytest.mark.parametrize("how", ["path", "symbolic link", "PATH"])
def test_the_command_starts_however_it_is_called(bare: Path, how: str, tmp_path: Path) -> None:
    link = tmp_path / "sciexec"
    link.symlink_to(bare / "sciexec")
    command, path = {
        "path": (str(bare / "sciexec"), "/usr/bin:/bin"),
        "symbolic link": (str(link), "/usr/bin:/bin"),
        "PATH": ("sciexec", f"{bare}:/usr/bin:/bin"),
    }[how]
    found = shutil.which(command, path=path)
    assert found
    environment = {"PATH": path, "HOME": str(tmp_path)}
    done = subprocess.run([found, "--version"], env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.1.0" in done.stdout


def test_a_container_runs_with_none_of_the_dependencies_installed(bare: Path, rootfs: Path, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [str(bare / "sciexec"), "exec", str(rootfs), "sh", "-c", "echo inside; exit 3"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("inside\n", 3), done.stderr

