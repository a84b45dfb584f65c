"""Every row of tests/tables/, run with sciexec as an ordinary user; table_rows.py says how a row is written."""

from __future__ import annotations

from pathlib import Path

import demo_image
import pytest
import table_rows
from conftest import Need, architecture
from table_rows import Row

ROWS = table_rows.read()


@pytest.fixture(scope="module")
def places(rootfs: Path, need: Need, sciexec_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The placeholders: the images and who calls."""
    work = tmp_path_factory.mktemp("tables")
    tree = demo_image.make_tree(rootfs, work / "demo")
    demo_image.make_sif(need("mksquashfs"), tree, work / "demo.sif", architecture())
    demo_image.make_oci_sif(need("umoci"), rootfs, work, sciexec_path)
    return {**table_rows.caller(), "demo": f"{work}/demo.sif", "dir": f"{work}/demo", "oci": f"{work}/oci.sif"}


@pytest.mark.parametrize("row", [row for row in ROWS if not row.missing()], ids=lambda row: f"{row.table}: {row.name}")
def test_row(row: Row, places: dict[str, str], sciexec_path: Path, tmp_path: Path) -> None:
    here = {**places, "work": str(tmp_path / "work")}
    said = table_rows.wrong(row, table_rows.run(row, here, str(sciexec_path.parent)), here)
    if said:
        pytest.fail(f"tests/tables/{row.table}.txt:{row.number}\n" + "\n".join(row.given["$"]) + f"\n{said}", pytrace=False)
