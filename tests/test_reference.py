"""Names of images: Docker's grammar, Apptainer's spellings, and nothing that could reach a URL or path unchecked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.reference import Reference, is_digest, is_uri, parse
from sciexec.errors import UsageError

HEX = "0123456789abcdef" * 4
SHA256 = f"sha256:{HEX}"
SHA512 = f"sha512:{HEX}{HEX}"


def docker(host: str, repository: str, tag: str = "", digest: str = "") -> Reference:
    return Reference("docker", host=host, repository=repository, tag=tag, digest=digest)


GOOD = [
    ("docker://alpine", docker("docker.io", "library/alpine", "latest"), "alpine_latest.sif"),
    ("docker://alpine:3.18", docker("docker.io", "library/alpine", "3.18"), "alpine_3.18.sif"),
    ("docker://user/name", docker("docker.io", "user/name", "latest"), "name_latest.sif"),
    ("docker://docker.io/alpine", docker("docker.io", "library/alpine", "latest"), "alpine_latest.sif"),
    ("docker://index.docker.io/user/name:1", docker("docker.io", "user/name", "1"), "name_1.sif"),
    ("docker://localhost/name", docker("localhost", "name", "latest"), "name_latest.sif"),
    ("docker://localhost:5000/a/b-c/d__e.f:T_1-x", docker("localhost:5000", "a/b-c/d__e.f", "T_1-x"), "d__e.f_T_1-x.sif"),
    ("docker://host/name", docker("docker.io", "host/name", "latest"), "name_latest.sif"),  # no dot, no port: no host
    ("docker://ghcr.io/a/b", docker("ghcr.io", "a/b", "latest"), "b_latest.sif"),
    ("docker://10.0.0.1:5000/a", docker("10.0.0.1:5000", "a", "latest"), "a_latest.sif"),
    ("docker://[::1]:5000/a:1", docker("[::1]:5000", "a", "1"), "a_1.sif"),
    (f"docker://alpine@{SHA256}", docker("docker.io", "library/alpine", "", SHA256), f"alpine@sha256_{HEX}.sif"),
    (f"docker://alpine:3@{SHA256}", docker("docker.io", "library/alpine", "3", SHA256), "alpine_3@sha256.sif"),
    (f"docker://alpine@{SHA512}", docker("docker.io", "library/alpine", "", SHA512), f"alpine@sha512_{HEX}{HEX}.sif"),
    ("docker-archive:image.tar", Reference("docker-archive", path="image.tar"), "image.tar_latest.sif"),
    ("docker-archive:///data/image.tar", Reference("docker-archive", path="/data/image.tar"), "image.tar_latest.sif"),
    ("oci:////data//layout", Reference("oci", path="/data//layout"), "layout_latest.sif"),
    ("docker-archive://image.tar", Reference("docker-archive", path="image.tar"), "image.tar_latest.sif"),
    ("docker-archive:/data/i.tar:user/name:1", Reference("docker-archive", path="/data/i.tar", tag="user/name:1"), "name_1.sif"),
    ("oci:layout:app", Reference("oci", path="layout", tag="app"), "layout_app.sif"),
    ("oci:/data/layout/", Reference("oci", path="/data/layout/"), "layout_latest.sif"),
    ("oci:a b\N{LATIN SMALL LETTER E WITH ACUTE}:v1.0", Reference("oci", path="a b\N{LATIN SMALL LETTER E WITH ACUTE}", tag="v1.0"),
     "a b\N{LATIN SMALL LETTER E WITH ACUTE}_v1.0.sif"),
    ("oci-archive:image.tar:v1", Reference("oci-archive", path="image.tar", tag="v1"), "image.tar_v1.sif"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reference", "output"), GOOD, ids=[row[0][:60] for row in GOOD])
def test_parse(text: str, reference: Reference, output: str) -> None:
    assert parse(text) == reference
    assert parse(str(reference)) == reference
    assert reference.default_output() == output
    assert is_uri(text)


BAD = [
    ("alpine", "no transport"),
    ("library://alpine", "library is not supported"),
    ("shub://a/b", "shub is not supported"),
    ("oras://host/a", "oras is not supported"),
    ("https://host/a.sif", "https is not supported"),
    ("docker-daemon:alpine", "docker-daemon is not supported"),
    ("docker:alpine", "followed by //"),
    ("docker://", "not made of"),
    ("docker:///alpine", "not made of"),
    ("docker://host.org/", "not made of"),
    ("docker://Alpine", "lower case"),
    ("docker://host.org/User/name", "lower case"),
    ("docker://a//b", "not made of"),
    ("docker://a/../b", "not made of"),
    ("docker://../b", "not a host name"),  # '..' has a dot: by Docker's rule a host
    ("docker://a/./b", "not made of"),
    ("docker://a.b/-c", "not made of"),
    ("docker://x/a___b", "not made of"),
    ("docker://x/a b", "not made of"),
    ("docker://x/a\x1bc", "not made of"),
    ("docker://x/a?b", "not made of"),
    ("docker://x/a%2f", "not made of"),
    ("docker://x/" + "a" * 256, "not made of"),
    ("docker://user@host.org/a", "digest"),
    ("docker://ho_st.org/a", "not a host name"),
    ("docker://-h.org/a", "not a host name"),
    ("docker://host.org:0/a", "not a host name"),
    ("docker://host.org:65536/a", "not a host name"),
    ("docker://host.org:x/a", "not a host name"),
    ("docker://h.org:5000:5000/a", "not a host name"),
    ("docker://[:::]/a", "not a host name"),
    ("docker://[::1/a", "not a host name"),
    ("docker://a:", "tag"),
    ("docker://a:.b", "tag"),
    ("docker://a:b:c", "tag"),
    ("docker://a:b/c", "not a host name"),
    ("docker://a:" + "t" * 129, "tag"),
    ("docker://a:1\n", "tag"),
    ("docker://a@", "digest"),
    ("docker://a@sha256:../../x", "digest"),
    (f"docker://a@sha256:{HEX[1:]}", "digest"),
    (f"docker://a@sha256:{HEX}0", "digest"),
    (f"docker://a@sha256:{HEX.upper()}", "digest"),
    (f"docker://a@SHA256:{HEX}", "digest"),
    (f"docker://a@md5:{HEX[:32]}", "digest"),
    (f"docker://a@sha512:{HEX}", "digest"),
    (f"docker://a@{SHA256}\n", "digest"),
    (f"docker://a@{SHA256}@{SHA256}", "digest"),
    ("oci:", "names no file"),
    ("oci:a\0b", "names no file"),
    ("oci:dir:", "second colon"),
    ("oci:dir:a//", "second colon"),
    ("oci-archive:file: x", "second colon"),
    ("docker-archive:file:a\x1b", "second colon"),
]


@pytest.mark.parametrize(("text", "cause"), BAD, ids=[ascii(row[0][:60]) for row in BAD])
def test_parse_refuses(text: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        parse(text)
    assert (str(caught.value) + caught.value.hint).isprintable()


def test_an_unsupported_transport_says_what_is() -> None:
    with pytest.raises(UsageError) as caught:
        parse("library://alpine")
    assert all(f"{name}:" in caught.value.hint for name in ("docker", "docker-archive", "oci", "oci-archive"))


@pytest.mark.parametrize("text", ["library://a", "shub://a/b", "oras://a", "http://a", "https://a", "docker-daemon:a"])
def test_foreign_transports_are_no_file_names(text: str) -> None:
    assert is_uri(text)


FILES = ["image.sif", "./docker", "dir:tag", "./oci:x", "/data/docker://x", "", ":", "instance://a", "https", "library:x"]


@pytest.mark.parametrize("text", FILES)
def test_file_names_are_no_uris(text: str) -> None:
    assert not is_uri(text)


@pytest.mark.parametrize("text", ["", "sha256:", SHA256 + "\n", " " + SHA256, SHA256.replace("a", "\N{FULLWIDTH LATIN SMALL LETTER A}")])
def test_no_digest(text: str) -> None:
    assert not is_digest(text)


@given(st.one_of(st.text(), st.text(alphabet="docker:/oci-arhve@sha256.ABZ_ []").map("docker://".__add__)))
def test_any_text_is_a_reference_or_a_usage_error(text: str) -> None:
    try:
        reference = parse(text)
    except UsageError as error:
        assert str(error).isprintable()
    else:
        assert parse(str(reference)) == reference
        assert "/" not in reference.default_output()


def test_a_long_name_takes_no_time() -> None:
    """The grammar is matched without backtracking: 200 kB would otherwise never end."""
    for text in ("a" * 200_000, "a-" * 100_000, "a__" * 70_000, "." * 200_000, ("a." * 100_000) + "/x", "oci:d:" + "a-" * 100_000):
        with pytest.raises(UsageError):
            parse(f"docker://{text}!" if not text.startswith("oci:") else text)
