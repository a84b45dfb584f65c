"""Files that appear whole, and who wins where several make the same one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convert.output import Output
from sciexec.errors import UsageError


@pytest.mark.parametrize("theirs", [b"ours" * 1_000_000, b"ours" * 999_999 + b"OURS", b"ours" * 999_999, b"ours" * 1_000_001, b""])
def test_a_file_that_others_made_meanwhile(tmp_path: Path, theirs: bytes) -> None:
    """Is as good as ours where it is the same; else it is left alone."""
    path, content = tmp_path / "image", b"ours" * 1_000_000
    with Output(str(path)) as output:
        os.write(output.fd, content)
        path.write_bytes(theirs)
        if theirs == content:
            output.publish()
        else:
            with pytest.raises(UsageError, match="another file of that name was made meanwhile"):
                output.publish()
    assert path.read_bytes() == theirs
    assert list(tmp_path.iterdir()) == [path]
