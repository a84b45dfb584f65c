"""An OCI image becomes one SIF file: the story that `sciexec pull`, `build` and a run of a URI tell.

    reference -> manifest, config, layers (convert.oci)          metadata: objects, /.singularity.d (convert.metadata)
                       |                                                        |
                       v                                                        v
    blob -> inflate (thread, verified) -> tar.Reader -> layers.merge -> pysquashfs.Writer, inside the growing SIF

Nothing is published before the last digest is right: see convert.output.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from convert import layers, metadata, oci, reference, tar
from convert.blobs import Cache, CacheLost, image_key, open_cache
from convert.inflate import Damaged, Inflate
from convert.output import Output
from convert.progress import Progress
from convert.registry import Registry
from sciexec import pysquashfs, sif
from sciexec.errors import HostError, ImageError, LimitError, UsageError

T = TypeVar("T")


LAYOUT = "1"  # to be raised with whatever else than the settings changes the bytes of a converted image


@dataclass(frozen=True)
class Settings:
    """How an image is found and written; every field has a flag of the same name.

    Arguments:
        compression: gzip, zstd, lz4 or xz; level: None for the default (zstd 3).  block_size: bytes, a power of two.
        max_entries, max_bytes: members and uncompressed bytes allowed in an image; max_ratio: growth allowed of a layer.
        workers: threads that compress; None for one a core.  The output does not depend on it.
        arch: as --arch.  authfile, no_https: as convert.registry.Registry.  disable_cache: keep no blobs.
        repack: compress anew what is compressed already (a compression or block size was asked for).
    """

    compression: str = "zstd"
    level: int | None = None
    block_size: int = 1 << 17
    max_entries: int = tar.Limits.max_entries
    max_bytes: int = tar.Limits.max_bytes
    max_ratio: int = 500
    workers: int | None = None
    arch: str | None = None
    authfile: str = ""
    no_https: bool = False
    disable_cache: bool = False
    repack: bool = False

    def limits(self) -> tar.Limits:
        return tar.Limits(self.max_entries, self.max_bytes)

    def compressed(self, text: str) -> Settings:
        """With the value of --compression, NAME or NAME:LEVEL.  Raises UsageError."""
        name, colon, level = text.partition(":")
        if name not in pysquashfs.COMPRESSIONS:
            raise UsageError(f"--compression {text}: no compression of SquashFS", "one of " + ", ".join(pysquashfs.COMPRESSIONS))
        if colon and not level.isdecimal():
            raise UsageError(f"--compression {text}: the level is no number", "for instance zstd:9")
        return replace(self, compression=name, level=int(level) if level else None)


def pull(uri: str, out: str, settings: Settings, progress: Progress, *, force: bool = False) -> str:
    """Fetch an image and write it to the file `out` ("": named after the image, in the working directory); returns its path.

    Raises: UsageError, ImageError, LimitError, RegistryError, HostError; nothing appears under the name then.
    """
    pysquashfs.available()
    ref = reference.parse(uri)
    out = out or ref.default_output()
    with Output(out, force=force) as output:
        write(ref, output.fd, settings, progress)
        output.publish()
    return out


def write(ref: reference.Reference, fd: int, settings: Settings, progress: Progress) -> None:
    """Fetch an image and write it as a SIF to the file `fd`.  Raises as convert() does, and UsageError."""
    cache = None if settings.disable_cache else open_cache(warn=progress.warn)
    with_image(ref, settings, cache, progress, lambda image: convert(image, fd, settings, progress))


def cached(uri: str, settings: Settings, progress: Progress) -> str:
    """The path of an image that was named by a URI, converted into the cache, by its manifest's digest, if it is not there.

    Raises as pull() does, and HostError where there is no cache to put it in.
    """
    pysquashfs.available()
    ref = reference.parse(uri)
    cache = open_cache(warn=progress.warn)
    if cache is None:
        raise _no_place(uri)

    def converted(image: oci.Image) -> str:
        key = image_key(image.manifest_digest, LAYOUT, settings.compression, str(settings.level), str(settings.block_size))
        path = cache.image(key)
        if path is None:
            with cache.new_image(key) as new:
                convert(image, new.fd, settings, progress)
                path = new.commit()
        cache.remember(key, str(ref))
        return path

    try:
        return with_image(ref, settings, None if settings.disable_cache else cache, progress, converted)
    except CacheLost as error:
        raise _no_place(uri) from error


def with_image(ref: reference.Reference, settings: Settings, cache: Cache | None, progress: Progress, use: Callable[[oci.Image], T]) -> T:
    """What `use` makes of an image; it is called again for each layer that turns out to have been damaged in the cache.

    Raises what oci.open_image() and `use` raise.
    """
    discarded: set[str] = set()
    while True:
        registry = None
        if ref.transport == "docker":
            registry = Registry(ref, authfile=settings.authfile, no_https=settings.no_https, note=progress.warn)
        with oci.open_image(ref, arch=settings.arch, cache=cache, registry=registry, progress=progress) as image:
            try:
                return use(image)
            except Damaged as error:
                ours = [layer for layer in image.layers if layer.blob.digest == error.digest]
                if error.digest in discarded or not ours or not image.discard(ours[0]):
                    raise
                discarded.add(error.digest)
                progress.warn(f"{ref}: layer {error.digest[:19]} was damaged in the cache; it is fetched again")


def convert(image: oci.Image, fd: int, settings: Settings, progress: Progress) -> None:
    """Write `image` as a SIF to the file `fd`, whatever was in it.

    Raises: Damaged, ImageError, LimitError, RegistryError, HostError; the file is then worthless.
    """
    try:
        os.ftruncate(fd, 0)
        created = timestamp(image.created)
        builder = sif.Builder(fd, arch=image.arch, created=created)
        for datatype, name, data in metadata.objects(image):
            builder.add(datatype, name, data)
        with contextlib.ExitStack() as stack:
            source = _Layers(image, settings, progress, stack)
            writer = stack.enter_context(new_writer(fd, builder.partition_offset(), created, settings))
            try:
                root = layers.merge(len(image.layers), source.open, writer, where=source.where, extra=metadata.files(image), mtime=created)
            except ImageError as error:
                source.blame(error)
                raise
            builder.finish(writer.finish(root))
    except OSError as error:  # of the builder: all others have become errors of their own below
        raise HostError(f"writing the image of {image.reference}: {error.strerror}") from error


class _Layers:
    """The layers of an image as tars, for layers.merge."""

    def __init__(self, image: oci.Image, settings: Settings, progress: Progress, stack: contextlib.ExitStack) -> None:
        self._image, self._settings, self._stack = image, settings, stack
        self._limits = settings.limits()
        self._opened: set[int] = set()
        self._current: Inflate | None = None
        self._advance = progress.download(f"converting {image.reference}", sum(layer.blob.size for layer in image.layers))

    def where(self, number: int) -> str:
        layer = self._image.layers[number]
        return f"{self._image.reference}, layer {number + 1} of {len(self._image.layers)} ({(layer.blob.digest or layer.diff_id)[:19]})"

    def open(self, number: int) -> tar.Reader:
        if self._current is not None:
            self._current.close()
        layer = self._image.layers[number]
        self._current = Inflate(
            self._image.open(layer), digest=layer.blob.digest, size=layer.blob.size, diff_id=layer.diff_id,
            where=self.where(number), max_bytes=self._settings.max_bytes, max_ratio=self._settings.max_ratio,
        )  # fmt: skip
        self._stack.callback(self._current.close)
        again = number in self._opened  # what is read a second time has been counted
        self._opened.add(number)
        return tar.Reader(self._pieces(self._current), self._settings.limits() if again else self._limits, self.where(number))

    def _pieces(self, inflate: Inflate) -> Iterator[bytes]:
        seen = 0
        for piece in inflate:
            yield piece
            self._advance(inflate.consumed - seen)
            seen = inflate.consumed
        self._advance(inflate.consumed - seen)

    def blame(self, error: ImageError) -> None:
        """Raise Damaged if the bytes were wrong that made somebody see an error in a layer."""
        if self._current is not None and not isinstance(error, (Damaged, LimitError)):
            for _ in self._current:
                pass


def new_writer(fd: int, offset: int, created: int, settings: Settings) -> pysquashfs.Writer:
    return pysquashfs.Writer(
        fd, offset, compression=settings.compression, level=settings.level, block_size=settings.block_size,
        mtime=created, workers=settings.workers,
    )  # fmt: skip


def timestamp(created: int | None) -> int:
    """The one time an image carries, Unix s: SOURCE_DATE_EPOCH, else the image's own, else 0; never the clock.

    Source: reproducible-builds.org, SOURCE_DATE_EPOCH specification.  Raises UsageError for a value that is no number.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch:
        return max(0, created or 0)
    if not epoch.isdecimal():
        raise UsageError(f"SOURCE_DATE_EPOCH={epoch}: not a number of seconds")
    return int(epoch)


def _no_place(uri: str) -> HostError:
    return HostError(
        f"running {uri}: the cache cannot hold the converted image", "SCIEXEC_CACHEDIR names another place; or pull it to a file first"
    )
