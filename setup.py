"""The compiled part, sciexec._pysquashfs; everything else stands in pyproject.toml.

It is optional: without a compiler or libsquashfs, `pip install .` installs all the rest, and what writes an image says what is missing.
"""

from __future__ import annotations

import runpy

from setuptools import setup

module = runpy.run_path("sciexec/_pysquashfs_build.py")["builder"]().distutils_extension(tmpdir="build")
module.depends = ["sciexec/native/pysquashfs.c", "sciexec/native/window.h"]
module.optional = True

setup(ext_modules=[module])
