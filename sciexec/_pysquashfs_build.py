"""Declares the C half of `sciexec.pysquashfs` to cffi; the C itself, and libsquashfs 1.x below it, is in sciexec/native/pysquashfs.c.

    python -m sciexec._pysquashfs_build        builds sciexec/_pysquashfs.*.so in place, for work in a source tree

API mode, because half of libsquashfs's interface are inline functions over vtables, and because a compiler notices what changed.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import cffi

HERE = os.path.dirname(os.path.abspath(__file__))
NATIVE = os.path.join(HERE, "native")

DECLARATIONS = """
    #define SQUASHFS_BAD_NAME ...

    typedef struct image_t image_t;

    image_t *image_new(void);
    void image_free(image_t *image);
    int image_open(image_t *image, int fd, uint64_t offset, int compression, uint32_t level, uint16_t flags, uint32_t block_size,
                   uint32_t mtime, uint32_t workers, uint32_t backlog);
    int image_errno(const image_t *image);

    int image_begin(image_t *image, int plain);
    int image_append(image_t *image, const void *data, size_t size);
    int image_hole(image_t *image, uint64_t size);
    int64_t image_end(image_t *image);
    int64_t image_file(image_t *image, const void *data, size_t size, int plain);
    int image_sync(image_t *image);

    int image_xattr_begin(image_t *image);
    int image_xattr_add(image_t *image, const char *key, const void *value, size_t size);
    int64_t image_xattr_end(image_t *image);

    int image_directory_begin(image_t *image);
    int64_t image_entry(image_t *image, const char *name, size_t length, uint16_t mode, uint16_t uid, uint16_t gid, uint32_t mtime,
                        uint32_t number, uint32_t links, uint32_t xattr, uint32_t payload, const char *target, size_t target_length);
    int image_link(image_t *image, const char *name, size_t length, uint16_t mode, uint32_t number, uint64_t place);
    int64_t image_directory_end(image_t *image, uint16_t mode, uint16_t uid, uint16_t gid, uint32_t mtime, uint32_t number,
                                uint32_t links, uint32_t xattr, uint32_t parent);
    int64_t image_finish(image_t *image, uint32_t inodes, uint64_t root, const uint32_t *ids, uint16_t id_count);

    typedef struct sqfs_compressor_t sqfs_compressor_t;
    sqfs_compressor_t *uncompressor_new(int compression, uint32_t block_size);
    void uncompressor_free(sqfs_compressor_t *compressor);
    int32_t uncompress(sqfs_compressor_t *compressor, const void *data, uint32_t size, void *out, uint32_t room);

    size_t abi_size(int structure);
"""


def builder() -> cffi.FFI:
    """The module to be compiled; called from setup.py and below, in a source tree only."""
    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS)
    with open(os.path.join(NATIVE, "pysquashfs.c"), encoding="utf-8") as source:
        ffi.set_source("sciexec._pysquashfs", source.read(), libraries=["squashfs"], include_dirs=[NATIVE])
    return ffi


if __name__ == "__main__":
    module = builder()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # setuptools would read the pyproject.toml of the working directory
        shutil.copy2(module.compile(tmpdir=scratch, verbose=True), HERE)
