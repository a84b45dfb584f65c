"""The compiled parts; everything else stands in pyproject.toml.

    sciexec/_pysquashfs.*.so    writes images; needs libsquashfs
    sciexec/sciexec-fuse        a program that serves images; needs a C library alone

Both are optional: without a compiler or libsquashfs, `pip install .` installs all the rest, what writes an image says what is missing,
and images are served by squashfuse.
"""

from __future__ import annotations

import os
import runpy
import sys

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

SERVER = [f"sciexec/native/{name}.c" for name in ("fuse", "squashfs", "data", "decompress")]
HARDENING = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]  # it reads what strangers made


class BuildPrograms(build_ext):
    """build_ext, and the server, which setuptools has no word for."""

    def build_extensions(self) -> None:
        super().build_extensions()
        directory = os.path.dirname(self.get_ext_fullpath("sciexec._"))
        try:
            objects = self.compiler.compile(SERVER, output_dir=self.build_temp, extra_postargs=["-std=gnu11", "-O2", *HARDENING, "-fPIE"])
            self.compiler.link_executable(
                objects, "sciexec-fuse", output_dir=directory, libraries=["pthread", "dl"], extra_postargs=["-pie", "-Wl,-z,relro,-z,now"]
            )
        except (CompileError, LinkError) as error:
            print(f"warning: sciexec-fuse was not built: {error}", file=sys.stderr)


module = runpy.run_path("sciexec/_pysquashfs_build.py")["builder"]().distutils_extension(tmpdir="build")
module.depends = ["sciexec/native/pysquashfs.c", "sciexec/native/window.h"]
module.optional = True

setup(ext_modules=[module], cmdclass={"build_ext": BuildPrograms})
