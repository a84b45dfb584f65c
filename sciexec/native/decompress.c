/* One block of a SquashFS, decompressed.  Nothing is linked to: an image needs one of five libraries, and whoever serves it starts
   sooner with that one alone. */
#include "decompress.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>

/* The libraries are looked for when it is known which one is needed, under the names that their ABI has had for ten years. */
static void *(*zstd_new)(void);
static size_t (*zstd_run)(void *, void *, size_t, const void *, size_t);
static unsigned (*zstd_failed)(size_t);
static int (*zlib_run)(uint8_t *, unsigned long *, const uint8_t *, unsigned long);
static void *(*deflate_new)(void);
static int (*deflate_run)(void *, const void *, size_t, void *, size_t, size_t *);
static int (*lz4_run)(const char *, char *, int, int);
static int (*lzma_run)(uint64_t *, uint32_t, const void *, const uint8_t *, size_t *, size_t, uint8_t *, size_t *, size_t);

static _Thread_local void *context;

static int unzstd(const uint8_t *from, size_t length, uint8_t *into, size_t room)
{
	if (!context && !(context = zstd_new()))
		return -ENOMEM;
	size_t got = zstd_run(context, into, room, from, length);
	return zstd_failed(got) ? -EIO : (int)got;
}

static int undeflate(const uint8_t *from, size_t length, uint8_t *into, size_t room)
{
	size_t got = 0;
	if (!context && !(context = deflate_new()))
		return -ENOMEM;
	return deflate_run(context, from, length, into, room, &got) ? -EIO : (int)got;
}

static int unzlib(const uint8_t *from, size_t length, uint8_t *into, size_t room)
{
	unsigned long got = room;
	return zlib_run(into, &got, from, length) ? -EIO : (int)got;
}

static int unlz4(const uint8_t *from, size_t length, uint8_t *into, size_t room)
{
	int got = lz4_run((const char *)from, (char *)into, (int)length, (int)room);
	return got < 0 ? -EIO : got;
}

static int unxz(const uint8_t *from, size_t length, uint8_t *into, size_t room)
{
	uint64_t limit = 64 << 20;
	size_t taken = 0, got = 0;
	return lzma_run(&limit, 0, NULL, from, &taken, length, into, &got, room) ? -EIO : (int)got;
}

static int load(const char *library, void *symbols[], const char *const names[])
{
	void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
	for (size_t i = 0; handle && names[i]; i++) {
		void *found = dlsym(handle, names[i]);
		if (!found)
			return 0;
		memcpy(symbols[i], &found, sizeof found);
	}
	return handle != NULL;
}
#define LOAD(library, pointers, ...) load(library, (void *[])pointers, (const char *const[]){__VA_ARGS__, NULL})
#define SET(...) {__VA_ARGS__}

decompressor *decompressor_of(unsigned compression)
{
	switch (compression) {
	case 1:  /* libdeflate takes half of zlib's time */
		if (LOAD("libdeflate.so.0", SET(&deflate_new, &deflate_run), "libdeflate_alloc_decompressor", "libdeflate_zlib_decompress"))
			return undeflate;
		return LOAD("libz.so.1", SET(&zlib_run), "uncompress") ? unzlib : NULL;
	case 4:
		return LOAD("liblzma.so.5", SET(&lzma_run), "lzma_stream_buffer_decode") ? unxz : NULL;
	case 5:
		return LOAD("liblz4.so.1", SET(&lz4_run), "LZ4_decompress_safe") ? unlz4 : NULL;
	case 6:
		return LOAD("libzstd.so.1", SET(&zstd_new, &zstd_run, &zstd_failed), "ZSTD_createDCtx", "ZSTD_decompressDCtx", "ZSTD_isError")
			? unzstd : NULL;
	}
	return NULL;
}
