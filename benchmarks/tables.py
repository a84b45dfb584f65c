"""Runs the rows of tests/tables through Apptainer, and says where it does something else than the tables expect of sciexec.

    python3 benchmarks/tables.py [--shared DIR] [--enter COMMAND] [--program NAME] [-v] [REGEX]

    --shared DIR      made here, and seen under the same path by Apptainer: images and results
    --enter COMMAND   starts a command where Apptainer is: a chroot, another user; nothing for here
    --program NAME    what to run in place of sciexec [apptainer]
    -v                print each row that differs in full
    REGEX             only the rows whose table and name match

Prints how many rows were compared and were equal, and each difference with the reason that the row gives for it; the code is 1
where a difference has no reason, or a reason no difference.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TREE / "tests"), str(TREE)]

import conftest  # noqa: E402
import demo_image  # noqa: E402
import table_rows  # noqa: E402

WHO = "getent passwd $(id -u) | cut -d: -f1,3,4,6"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--enter", default="")
    parser.add_argument("--program", default="apptainer")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("regex", nargs="?", default="")
    given = parser.parse_args()
    shared = given.shared or Path(tempfile.mkdtemp(prefix="sciexec-tables-"))
    enter = shlex.split(given.enter)
    rows = [row for row in table_rows.read() if re.search(given.regex, f"{row.table}: {row.name}")]
    compared = [row for row in rows if not row.given["alone"]]
    images = make_images(shared)
    user, uid, gid, home = subprocess.run([*enter, "sh", "-c", WHO], capture_output=True, text=True, check=True).stdout.strip().split(":")
    results = shared / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(mode=0o777)
    results.chmod(0o777)
    wrapper = shared / "bin/sciexec"
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\nexec {given.program} "$@"\n')
    wrapper.chmod(0o755)
    places, driver = [], ["umask 022"]
    for number, row in enumerate(compared):
        work = f"/tmp/sciexec-tables/{number}"
        place = {**images, "home": home, "user": user, "uid": uid, "gid": gid, "work": work}
        places.append(place)
        (results / f"{number}.sh").write_text(table_rows.script(row, place, str(wrapper.parent)))
        driver.append(f"sh {results}/{number}.sh; cp {work}.out {work}.err {work}.code {results}/; chmod -R u+rwX {work}; rm -rf {work}")
    (results / "all.sh").write_text("\n".join(driver))
    subprocess.run([*enter, "sh", str(results / "all.sh")], check=True, stdin=subprocess.DEVNULL)
    equal, known, bad = 0, 0, 0
    for number, (row, place) in enumerate(zip(compared, places)):
        difference = table_rows.wrong(row, table_rows.result(results / str(number)), place, stderr=False)
        reason = row.text("differs")
        equal += not difference
        if bool(difference) != bool(reason):
            bad += 1
            print(f"{row.table}:{row.number}: {row.name}: {'equal, but a reason is given' if reason else 'differs without a reason'}")
        elif difference:
            known += 1
            print(f"{row.table}:{row.number}: {row.name}: differs: {reason}")
        if difference and (given.verbose or not reason):
            print("".join(f"        {line}\n" for line in [*row.given["$"], *difference.splitlines()]), end="")
    print(f"rows {len(rows)}, compared {len(compared)}, equal {equal}, different for a reason {known}, other {bad}")
    return 1 if bad else 0


def make_images(shared: Path) -> dict[str, str]:
    """The images of the rows, made once."""
    if not (shared / "oci.sif").exists():
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir(parents=True)
        shared.chmod(0o755)
        factory = Factory(shared)
        rootfs = next(conftest.rootfs.__wrapped__(factory))
        tree = demo_image.make_tree(rootfs, shared / "demo")
        demo_image.make_sif("mksquashfs", tree, shared / "demo.sif", conftest.architecture())
        demo_image.make_oci_sif("umoci", rootfs, shared, Path(sys.executable).parent / "sciexec")
    return {"demo": f"{shared}/demo.sif", "dir": f"{shared}/demo", "oci": f"{shared}/oci.sif"}


class Factory:
    """As pytest's tmp_path_factory, in a directory of ours."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def mktemp(self, name: str) -> Path:
        (self.top / name).mkdir(mode=0o755)
        return self.top / name


if __name__ == "__main__":
    sys.exit(main())
