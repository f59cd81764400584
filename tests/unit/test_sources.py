"""Files and spooled parts give the same bytes, from any offset, or say why they cannot."""

import gzip
import hashlib
import io
import os
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs._errors import InputError
from jobs._sources.source import (
    Compression,
    FileSource,
    Inspection,
    Inspector,
    PartsSource,
    compression_of,
    inspect,
)
from jobs._sources.spool import pack_part, split_parts, unpack_part

KIB = 1024
TEXT = b"".join(b"%d,Hero %d\n" % (number, number * 7919) for number in range(100_000))
MEMBERS = gzip.compress(TEXT[:1000]) + gzip.compress(b"") + gzip.compress(TEXT[1000:])


def file_source(path: Path, stored: bytes) -> FileSource:
    path.write_bytes(stored)
    return FileSource(path, [path.parent])


def parts_source(stored: bytes, part_bytes: int) -> PartsSource:
    parts = dict(enumerate(split_parts(io.BytesIO(stored), part_bytes)))
    return PartsSource(parts.get, part_bytes, compression_of(stored))


def inspected(stored: bytes, block_bytes: int = 64 * KIB) -> Inspection:
    inspector = Inspector()
    for at in range(0, len(stored), block_bytes):
        inspector.feed(stored[at : at + block_bytes])
    return inspector.finish()


def refusal(stored: bytes, block_bytes: int = 64 * KIB) -> str:
    with pytest.raises(InputError) as refused:
        inspected(stored, block_bytes)
    return str(refused.value)


# The same bytes from every source


@pytest.mark.parametrize("stored", [TEXT, gzip.compress(TEXT), MEMBERS])
@pytest.mark.parametrize("offset", [0, 1, 999, 1000, 1001, 300_000, len(TEXT) - 1, len(TEXT)])
def test_a_file_gives_its_text_from_any_offset(tmp_path: Path, stored: bytes, offset: int) -> None:
    with file_source(tmp_path / "named.txt", stored) as source:
        assert b"".join(source.blocks(offset)) == TEXT[offset:]


@pytest.mark.parametrize("stored", [TEXT, gzip.compress(TEXT), MEMBERS])
@pytest.mark.parametrize("part_bytes", [1000, 4096, len(TEXT), len(TEXT) + 1])
def test_parts_give_the_text_of_the_whole_from_any_offset(stored: bytes, part_bytes: int) -> None:
    source = parts_source(stored, part_bytes)
    for offset in (0, 1, 999, 1000, 4096, len(TEXT) - 1, len(TEXT)):
        assert b"".join(source.blocks(offset)) == TEXT[offset:]
    assert b"".join(source.raw_blocks()) == stored


def test_plain_parts_in_front_of_the_offset_are_not_fetched() -> None:
    fetched = []

    def fetch(number: int) -> bytes | None:
        fetched.append(number)
        return [b"abcd", b"efgh", b"ij", None][number]

    assert b"".join(PartsSource(fetch, 4, "none").blocks(6)) == b"ghij"
    assert 0 not in fetched


@pytest.mark.parametrize("parts", [[b"abc", b"defg"], [b"abcde"]])
def test_parts_of_the_wrong_size_are_refused(parts: list[bytes]) -> None:
    source = PartsSource(dict(enumerate(parts)).get, 4, "none")
    with pytest.raises(InputError, match="does not fit together"):
        list(source.blocks())


def test_two_readers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    with file_source(tmp_path / "rows.csv", TEXT) as source:
        pairs = list(zip(source.blocks(), source.blocks(), strict=True))
        assert b"".join(one for one, _ in pairs) == b"".join(other for _, other in pairs) == TEXT


def test_blocks_are_bounded_however_well_the_input_is_compressed(tmp_path: Path) -> None:
    zeros = zlib.compressobj(9, zlib.DEFLATED, 31)
    stored = b"".join(zeros.compress(bytes(KIB * KIB)) for _ in range(200)) + zeros.flush()
    tracemalloc.start()
    try:
        with file_source(tmp_path / "bomb", stored) as source:
            sizes = [len(block) for block in source.blocks()]
            assert inspect(source).text_bytes == 200 * KIB * KIB
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 200 * KIB * KIB
    assert max(sizes) <= 512 * KIB
    assert peak_bytes < 8 * KIB * KIB


def test_a_member_for_every_line_still_gives_blocks_of_useful_size(tmp_path: Path) -> None:
    stored = b"".join(gzip.compress(b"%d\n" % number) for number in range(5000))
    with file_source(tmp_path / "log.gz", stored) as source:
        blocks = list(source.blocks())
    assert b"".join(blocks) == b"".join(b"%d\n" % number for number in range(5000))
    assert len(blocks) == 1


# Inspection


@pytest.mark.parametrize(
    ("stored", "compression"), [(TEXT, "none"), (gzip.compress(TEXT), "gzip"), (MEMBERS, "gzip")]
)
def test_an_inspection_covers_the_bytes_as_stored(
    tmp_path: Path, stored: bytes, compression: Compression
) -> None:
    wanted = (hashlib.sha256(stored).hexdigest(), len(stored), len(TEXT), compression)
    with file_source(tmp_path / "rows", stored) as source:
        assert inspect(source) == wanted
    assert inspect(parts_source(stored, 5000)) == wanted


@pytest.mark.parametrize("stored", [b"x", b"\x1f", b"xy", gzip.compress(b"some,text\n")])
def test_an_inspection_does_not_depend_on_how_the_bytes_arrive(stored: bytes) -> None:
    assert inspected(stored, block_bytes=1) == inspected(stored)


@pytest.mark.parametrize("stored", [b"", gzip.compress(b"")])
def test_an_empty_input_is_refused(stored: bytes) -> None:
    assert "empty" in refusal(stored)


@pytest.mark.parametrize("block_bytes", [1, 64 * KIB])
@pytest.mark.parametrize("length", [2, 9, 15, 100, len(MEMBERS) - 1])
def test_a_gzip_cut_off_anywhere_is_refused_with_the_byte_where_it_ends(
    length: int, block_bytes: int
) -> None:
    message = refusal(MEMBERS[:length], block_bytes)
    assert "cut off" in message
    assert f"at byte {length}," in message


@pytest.mark.parametrize("block_bytes", [1, 64 * KIB])
def test_a_damaged_gzip_is_refused_with_the_byte_of_the_damage(block_bytes: int) -> None:
    stored = gzip.compress(TEXT)
    checksum_at = len(stored) - 8
    broken = stored[:checksum_at] + bytes([stored[checksum_at] ^ 1]) + stored[checksum_at + 1 :]
    # zlib compares a checksum when its four bytes are complete
    assert f"damaged at byte {checksum_at + 3};" in refusal(broken, block_bytes)


def test_a_damaged_later_member_is_refused_with_the_byte_of_the_damage() -> None:
    first, second = gzip.compress(TEXT), gzip.compress(b"x" * 1000)
    broken = first + second[:2] + b"\x07" + second[3:]
    # zlib takes method and flags, the third and fourth byte, together
    assert f"damaged at byte {len(first) + 3};" in refusal(broken)


@pytest.mark.parametrize("block_bytes", [1, 7, 64 * KIB])
@pytest.mark.parametrize("garbage", [b"garbage", b"\x1fx", b"\0" * 512, TEXT])
def test_bytes_behind_a_gzip_are_refused_with_their_place(garbage: bytes, block_bytes: int) -> None:
    stored = gzip.compress(b"id\n1\n")
    message = refusal(stored + garbage, block_bytes)
    assert f"behind its compressed data, from byte {len(stored)} on" in message


def test_a_damaged_gzip_is_refused_while_reading_too(tmp_path: Path) -> None:
    with (
        file_source(tmp_path / "rows.gz", MEMBERS[:-1]) as source,
        pytest.raises(InputError, match="cut off"),
    ):
        list(source.blocks())


# Files


def open_refusal(path: Path, *folders: Path) -> str:
    with pytest.raises(InputError) as refused:
        FileSource(path, folders)
    return str(refused.value)


def test_a_file_outside_the_allowed_folders_is_refused_with_the_setting(tmp_path: Path) -> None:
    (allowed := tmp_path / "allowed").mkdir()
    secret = tmp_path / "secret.csv"
    secret.write_bytes(TEXT)
    (allowed / "link.csv").symlink_to(secret)
    ways = [secret, tmp_path / "absent.csv", allowed / "link.csv", allowed / ".." / "secret.csv"]
    for path in ways:
        assert "BULWARK_IMPORT_FOLDERS" in open_refusal(path, allowed)
    assert "BULWARK_IMPORT_FOLDERS" in open_refusal(secret)


def test_a_folder_whose_name_begins_like_an_allowed_one_is_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "inside.csv").write_bytes(TEXT)
    assert "BULWARK_IMPORT_FOLDERS" in open_refusal(tmp_path / "inside.csv", tmp_path / "in")


def test_links_within_the_allowed_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "rows.csv").write_bytes(b"id\n1\n")
    (tmp_path / "door").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "latest.csv").symlink_to("rows.csv")
    with FileSource(tmp_path / "door" / "latest.csv", [tmp_path / "door"]) as source:
        assert b"".join(source.blocks()) == b"id\n1\n"


def test_what_cannot_be_read_as_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert "No such file" in open_refusal(tmp_path / "absent.csv", tmp_path)
    assert "not a regular file" in open_refusal(tmp_path, tmp_path)
    assert "not a regular file" in open_refusal(tmp_path / "pipe", tmp_path)
    assert "input" in open_refusal(tmp_path / "round", tmp_path)
    assert "cannot be followed" in open_refusal(tmp_path / "a\0b", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(TEXT)
    (tmp_path / "mine.csv").chmod(0)
    assert "Permission denied" in open_refusal(tmp_path / "mine.csv", tmp_path)


def test_an_untouched_file_has_not_changed(tmp_path: Path) -> None:
    with file_source(tmp_path / "rows.csv", TEXT) as source:
        list(source.blocks())
        assert not source.changed()


def test_a_file_that_was_written_to_has_changed(tmp_path: Path) -> None:
    with file_source(tmp_path / "rows.csv", TEXT) as source:
        with source.path.open("ab") as stream:
            stream.write(b"more\n")
        assert source.changed()


def test_a_file_rewritten_in_the_same_size_has_changed(tmp_path: Path) -> None:
    with file_source(tmp_path / "rows.csv", TEXT) as source:
        opened = source.path.stat()
        source.path.write_bytes(TEXT[::-1])
        os.utime(source.path, ns=(opened.st_atime_ns, opened.st_mtime_ns + 1))
        assert source.changed()


def test_a_file_that_was_replaced_or_removed_has_changed_but_stays_readable(tmp_path: Path) -> None:
    with file_source(tmp_path / "rows.csv", TEXT) as source:
        opened = source.path.stat()
        other = tmp_path / "other.csv"
        other.write_bytes(TEXT)
        os.utime(other, ns=(opened.st_atime_ns, opened.st_mtime_ns))
        other.replace(source.path)
        assert source.changed()
        source.path.unlink()
        assert source.changed()
        assert b"".join(source.blocks()) == TEXT


def test_a_link_that_points_elsewhere_now_has_changed(tmp_path: Path) -> None:
    (tmp_path / "monday.csv").write_bytes(TEXT)
    (tmp_path / "tuesday.csv").write_bytes(TEXT)
    (tmp_path / "latest.csv").symlink_to("monday.csv")
    with FileSource(tmp_path / "latest.csv", [tmp_path]) as source:
        assert not source.changed()
        (tmp_path / "latest.csv").unlink()
        (tmp_path / "latest.csv").symlink_to("tuesday.csv")
        assert source.changed()


def test_closing_gives_the_file_back_and_may_be_repeated(tmp_path: Path) -> None:
    source = file_source(tmp_path / "rows.csv", TEXT)
    source.close()
    source.close()
    with pytest.raises(OSError, match="descriptor"):
        list(source.blocks())


# Spooling


class ShortReads(io.RawIOBase):
    """A stream that gives at most three bytes at a time, as a socket may."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(min(size, 3))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50))
def test_parts_are_full_but_for_the_last_and_add_up_to_the_input(
    data: bytes, part_bytes: int
) -> None:
    parts = list(split_parts(ShortReads(data), part_bytes))  # type: ignore[arg-type]
    assert b"".join(parts) == data
    assert all(len(part) == part_bytes for part in parts[:-1])
    assert all(0 < len(part) <= part_bytes for part in parts)


@settings(deadline=None)
@given(st.binary(), st.sampled_from(["none", "gzip"]))
def test_a_packed_part_unpacks_to_itself(raw: bytes, compression: Compression) -> None:
    assert unpack_part(pack_part(raw, compression)) == raw


def test_plain_parts_are_compressed_and_gzip_parts_are_stored_as_they_are() -> None:
    assert len(pack_part(TEXT, "none")) < len(TEXT) / 2
    assert pack_part(MEMBERS, "gzip")[1:] == MEMBERS


@pytest.mark.parametrize("packed", [b"", b"?abc", b"zabc", pack_part(TEXT, "none")[:-1]])
def test_a_damaged_part_is_refused(packed: bytes) -> None:
    with pytest.raises(InputError, match="spooled part"):
        unpack_part(packed)


def uploaded(stored: bytes, part_bytes: int) -> Iterator[bytes]:
    compression = compression_of(stored)
    for part in split_parts(io.BytesIO(stored), part_bytes):
        yield pack_part(part, compression)


@pytest.mark.parametrize("stored", [TEXT, MEMBERS])
def test_what_was_spooled_reads_as_what_was_sent(stored: bytes) -> None:
    spool = list(uploaded(stored, 10_000))

    def fetch(number: int) -> bytes | None:
        return unpack_part(spool[number]) if number < len(spool) else None

    source = PartsSource(fetch, 10_000, compression_of(stored))
    assert inspect(source) == inspected(stored)
    assert b"".join(source.blocks(12_345)) == TEXT[12_345:]
