"""Files and spooled parts give the same bytes, from any offset, or say why they cannot."""

import hashlib
import os
import re
import socket
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from jobs._errors import InputError
from jobs._sources.compression import Compression, compression_of
from jobs._sources.encoding import encoding_name, marked_byte
from jobs._sources.format import Layout
from jobs._sources.opened import Inspection, inspect
from jobs._sources.source import FileSource, PartsSource, Stored, Text, raw_blocks
from jobs._sources.spool import pack_part, unpack_part
from tests.gzipped import gzipped
from tests.parts import StoredBytes

KIB = 1024
MIB = 1024 * KIB
TEXT = b"".join(b"%d,Hero %d\n" % (number, number * 7919) for number in range(100_000))
MEMBERS = gzipped(TEXT[:1000]) + gzipped(b"") + gzipped(TEXT[1000:])
CHECKED = {int(zstd.CompressionParameter.checksum_flag): 1}
FRAMES = (
    zstd.compress(TEXT[:1000])
    + b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # a frame to be skipped
    + zstd.compress(TEXT[1000:], options=CHECKED)
)
STORED = [TEXT, gzipped(TEXT), MEMBERS, zstd.compress(TEXT), FRAMES]
CSV = Layout(format="csv", encoding="utf-8", delimiter=",")


def file_source(path: Path, stored: bytes) -> FileSource:
    path.write_bytes(stored)
    return FileSource(path, [path.parent])


def cut(stored: bytes, part_bytes: int) -> list[bytes]:
    return [stored[at : at + part_bytes] for at in range(0, len(stored), part_bytes)]


def parts_source(stored: bytes, part_bytes: int) -> PartsSource:
    return PartsSource(dict(enumerate(cut(stored, part_bytes))).get, part_bytes, len(stored))


def text_of(stored: Stored, offset: int = 0) -> bytes:
    return b"".join(Text.of(stored).blocks(offset))


def inspection_of(stored: Stored) -> Inspection:
    return inspect(Text.of(stored), CSV)


def inspected(stored: bytes, block_bytes: int = 64 * KIB) -> Inspection:
    return inspection_of(StoredBytes(stored, block_bytes))


def refusal(stored: bytes, block_bytes: int = 64 * KIB) -> str:
    with pytest.raises(InputError) as refused:
        inspected(stored, block_bytes)
    return str(refused.value)


# The same bytes from every source


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("offset", [0, 1, 999, 1000, 1001, 300_000, len(TEXT) - 1, len(TEXT)])
def test_a_file_gives_its_text_from_any_offset(tmp_path: Path, stored: bytes, offset: int) -> None:
    with file_source(tmp_path / "named.txt", stored) as source:
        assert text_of(source, offset) == TEXT[offset:]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("part_bytes", [1000, 4096, len(TEXT), len(TEXT) + 1])
def test_parts_give_the_text_of_the_whole_from_any_offset(stored: bytes, part_bytes: int) -> None:
    source = parts_source(stored, part_bytes)
    for offset in (0, 1, 999, 1000, 4096, len(TEXT) - 1, len(TEXT)):
        assert text_of(source, offset) == TEXT[offset:]
    assert b"".join(raw_blocks(source)) == stored


def test_plain_parts_in_front_of_the_offset_are_not_fetched() -> None:
    fetched = []

    def fetch(number: int) -> bytes | None:
        fetched.append(number)
        return [b"abcd", b"efgh", b"ij"][number]

    assert b"".join(raw_blocks(PartsSource(fetch, 4, 10), 6)) == b"ghij"
    assert fetched == [1, 2]


@pytest.mark.parametrize("parts", [[b"abc", b"defg"], [b"abcde"]])
def test_parts_of_the_wrong_size_are_refused(parts: list[bytes]) -> None:
    source = PartsSource(dict(enumerate(parts)).get, 4, sum(map(len, parts)))
    with pytest.raises(InputError, match="does not fit together"):
        list(raw_blocks(source))


def test_a_part_that_is_gone_is_told_by_its_number() -> None:
    source = PartsSource({0: b"abcd"}.get, 4, 6)
    with pytest.raises(InputError, match="Part 1 of the spooled input is gone"):
        list(raw_blocks(source))


def test_two_readers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    with file_source(tmp_path / "rows.csv", TEXT) as source:
        text = Text.of(source)
        pairs = list(zip(text.blocks(), text.blocks(), strict=True))
        assert b"".join(one for one, _ in pairs) == b"".join(other for _, other in pairs) == TEXT


def bombs() -> Iterator[bytes]:
    for packer in (zlib.compressobj(9, zlib.DEFLATED, 31), zstd.ZstdCompressor(19)):
        zeros = b"".join(packer.compress(bytes(KIB * KIB)) for _ in range(200))
        yield zeros + packer.flush()


@pytest.mark.parametrize("stored", list(bombs()), ids=["gzip", "zstd"])
def test_blocks_are_bounded_however_well_the_input_is_compressed(
    tmp_path: Path, stored: bytes
) -> None:
    tracemalloc.start()
    try:
        with file_source(tmp_path / "bomb", stored) as source:
            sizes = [len(block) for block in Text.of(source).blocks()]
            assert inspection_of(source).text_bytes == 200 * KIB * KIB
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 200 * KIB * KIB
    assert max(sizes) <= 512 * KIB
    assert peak_bytes < 8 * KIB * KIB


@pytest.mark.parametrize("pack", [gzipped, zstd.compress])
def test_a_member_for_every_line_still_gives_blocks_of_useful_size(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    stored = b"".join(pack(b"%d\n" % number) for number in range(5000))
    with file_source(tmp_path / "log", stored) as source:
        blocks = list(Text.of(source).blocks())
    assert b"".join(blocks) == b"".join(b"%d\n" % number for number in range(5000))
    assert len(blocks) == 1


def test_a_zstd_window_that_would_take_too_much_memory_is_refused_with_the_remedy() -> None:
    options = {int(zstd.CompressionParameter.window_log): 27}
    packer = zstd.ZstdCompressor(options=options)
    stored = packer.compress(TEXT) + packer.flush()
    message = refusal(stored)
    assert "window of more than 32 MiB" in message
    assert "without --ultra and --long" in message


# Inspection


@pytest.mark.parametrize(
    ("stored", "compression"),
    [(TEXT, "none"), (gzipped(TEXT), "gzip"), (MEMBERS, "gzip"), (FRAMES, "zstd")],
)
def test_an_inspection_covers_the_bytes_as_stored(
    tmp_path: Path, stored: bytes, compression: Compression
) -> None:
    wanted = (hashlib.sha256(stored).hexdigest(), len(stored), len(TEXT), compression, None)
    with file_source(tmp_path / "rows", stored) as source:
        assert inspection_of(source) == wanted
    assert inspection_of(parts_source(stored, 5000)) == wanted


@pytest.mark.parametrize(
    "stored", [b"x", b"\x1f", b"xy", gzipped(b"some,text\n"), zstd.compress(b"some,text\n")]
)
def test_an_inspection_does_not_depend_on_how_the_bytes_arrive(stored: bytes) -> None:
    assert inspected(stored, block_bytes=1) == inspected(stored)


@pytest.mark.parametrize("stored", [b"", gzipped(b""), zstd.compress(b"")])
def test_an_empty_input_is_refused(stored: bytes) -> None:
    assert "empty" in refusal(stored)


@pytest.mark.parametrize("block_bytes", [1, 64 * KIB])
@pytest.mark.parametrize("length", [4, 9, 15, 100, 5000])
@pytest.mark.parametrize("stored", [MEMBERS, FRAMES], ids=["gzip", "zstd"])
def test_what_is_cut_off_anywhere_is_refused_with_the_byte_where_it_ends(
    stored: bytes, length: int, block_bytes: int
) -> None:
    message = refusal(stored[:length], block_bytes)
    assert "cut off" in message
    assert f"at byte {length}," in message


@pytest.mark.parametrize("block_bytes", [1, 64 * KIB])
def test_a_damaged_gzip_is_refused_with_the_byte_of_the_damage(block_bytes: int) -> None:
    stored = gzipped(TEXT)
    checksum_at = len(stored) - 8
    broken = stored[:checksum_at] + bytes([stored[checksum_at] ^ 1]) + stored[checksum_at + 1 :]
    # zlib compares a checksum when its four bytes are complete
    assert f"damaged at byte {checksum_at + 3};" in refusal(broken, block_bytes)


def test_a_damaged_later_member_is_refused_with_the_byte_of_the_damage() -> None:
    first, second = gzipped(TEXT), gzipped(b"x" * 1000)
    broken = first + second[:2] + b"\x07" + second[3:]
    # zlib takes method and flags, the third and fourth byte, together
    assert f"damaged at byte {len(first) + 3};" in refusal(broken)


@pytest.mark.parametrize("place", ["checksum", "data"])
@pytest.mark.parametrize("block_bytes", [1, 64 * KIB])
def test_a_damaged_zstd_is_refused_with_the_bytes_between_which_it_is(
    place: str, block_bytes: int
) -> None:
    stored = zstd.compress(TEXT, options=CHECKED)
    at = len(stored) - 2 if place == "checksum" else len(stored) // 2
    message = refusal(stored[:at] + bytes([stored[at] ^ 255]) + stored[at + 1 :], block_bytes)
    found = re.search(r"damaged between byte (\d+) and (\d+);", message)
    assert found is not None
    assert int(found[2]) - int(found[1]) <= 16 * KIB
    assert at < int(found[2])


@pytest.mark.parametrize("block_bytes", [1, 7, 64 * KIB])
@pytest.mark.parametrize("garbage", [b"garbage", b"\x1fx", b"\0" * 512, TEXT])
@pytest.mark.parametrize("pack", [gzipped, zstd.compress])
def test_bytes_behind_what_is_compressed_are_refused_with_their_place(
    pack: Callable[[bytes], bytes], garbage: bytes, block_bytes: int
) -> None:
    stored = pack(b"id\n1\n")
    message = refusal(stored + garbage, block_bytes)
    assert f"behind its compressed data, from byte {len(stored)} on" in message


def test_a_damaged_gzip_is_refused_while_reading_too(tmp_path: Path) -> None:
    with (
        file_source(tmp_path / "rows.gz", MEMBERS[:-1]) as source,
        pytest.raises(InputError, match="cut off"),
    ):
        text_of(source)


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
        assert text_of(source) == b"id\n1\n"


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
        text_of(source)
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
        assert text_of(source) == TEXT


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
        text_of(source)


# Spooling


@given(st.binary(), st.sampled_from(["none", "gzip", "zstd"]))
def test_a_packed_part_unpacks_to_itself(raw: bytes, compression: Compression) -> None:
    assert unpack_part(pack_part(raw, compression)) == raw


def test_plain_parts_are_compressed_and_gzip_parts_are_stored_as_they_are() -> None:
    assert len(pack_part(TEXT, "none")) < len(TEXT) / 2
    assert pack_part(MEMBERS, "gzip")[1:] == MEMBERS


@pytest.mark.parametrize("packed", [b"", b"?abc", b"zabc", pack_part(TEXT, "none")[:-1]])
def test_a_damaged_part_is_refused(packed: bytes) -> None:
    with pytest.raises(InputError, match="spooled part"):
        unpack_part(packed)


@pytest.mark.parametrize("stored", STORED)
def test_what_was_spooled_reads_as_what_was_sent(stored: bytes) -> None:
    spool = [pack_part(part, compression_of(stored)) for part in cut(stored, 10_000)]
    source = PartsSource(lambda number: unpack_part(spool[number]), 10_000, len(stored))
    assert inspection_of(source) == inspected(stored)
    assert text_of(source, 12_345) == TEXT[12_345:]


# Encodings

LINES = "name,note\nZoë,naïve\n" * 50


@pytest.mark.parametrize("block_bytes", [1, 7, 64 * KIB])
@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "utf-16", "utf-16-be", "utf-32", "utf-8-sig", "mac_roman"]
)
def test_text_in_a_declared_encoding_is_read_as_utf8_from_any_offset(
    encoding: str, block_bytes: int
) -> None:
    stored = StoredBytes(gzipped(LINES.encode(encoding)), block_bytes)
    for offset in (0, 11, 1000):
        found = b"".join(Text.of(stored, encoding).blocks(offset))
        assert found == LINES.encode()[offset:]


@pytest.mark.parametrize("block_bytes", [1, 64 * KIB])
@pytest.mark.parametrize(
    ("encoding", "stored", "text"),
    [
        ("cp1252", b"a\x81\x80\n", "a\udc81€\n"),
        ("utf-16-le", b"a\0\x00\xd8\n\0b\0", "a\udc00\udcd8\nb"),
        ("utf-16-le", b"a\0b", "a\udc62"),
        ("shift_jis", b"\x83\x41\xff\n", "ア\udcff\n"),
        ("ascii", b"\xc3\xab", "\udcc3\udcab"),
    ],
)
def test_bytes_without_a_character_are_marked_where_they_stand(
    encoding: str, stored: bytes, text: str, block_bytes: int
) -> None:
    found = b"".join(Text.of(StoredBytes(stored, block_bytes), encoding).blocks())
    assert found.decode(errors="surrogatepass") == text


def test_a_mark_tells_the_byte_that_stood_there() -> None:
    marks = ("\udc81", "\udcff", "é", "\ud800")
    assert [marked_byte(one) for one in marks] == [0x81, 0xFF, None, None]


def test_utf16_without_its_mark_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match="utf-16-le or utf-16-be"):
        b"".join(Text.of(StoredBytes("a,b".encode("utf-16-le")), "utf-16").blocks())


@pytest.mark.parametrize("name", ["rot13", "hex", "idna", "unicode_escape", "nope", ""])
def test_what_is_no_encoding_of_files_cannot_be_declared(name: str) -> None:
    with pytest.raises(ValueError, match="is no encoding"):
        encoding_name(name)


# What changes between the look and the opening, and what is no file


class Swapping(PosixPath):
    """A path at which somebody puts a link as soon as it has been followed."""

    def resolve(self, strict: bool = False) -> Any:
        found = PosixPath(self).resolve(strict)
        folder = PosixPath(self).parent
        folder.rename(folder.with_name("aside"))
        folder.symlink_to(folder.parent.with_name("outside"))
        return found


def test_a_folder_that_becomes_a_link_while_the_file_is_opened_leads_nowhere(
    tmp_path: Path,
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "inner", outside):
        folder.mkdir(parents=True)
        (folder / "rows.csv").write_bytes(folder.name.encode())
    with pytest.raises(InputError, match="cannot be opened"):
        FileSource(Swapping(inside / "inner" / "rows.csv"), [inside])
    assert (inside / "inner" / "rows.csv").read_bytes() == b"outside"


def test_devices_and_sockets_are_refused_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for path in (Path("/dev/zero"), Path("/dev/full"), tmp_path / "s"):
            with pytest.raises(InputError, match=r"not a regular file|cannot be opened"):
                FileSource(path, [path.parent])


# Bombs


def _gzip_bomb(mebibytes: int) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return b"".join([*(packer.compress(bytes(MIB)) for _ in range(mebibytes)), packer.flush()])


def _zstd_bomb(mebibytes: int) -> bytes:
    packer = zstd.ZstdCompressor()
    rows = b"a,b\n" * (MIB // 4)
    return b"".join([*(packer.compress(rows) for _ in range(mebibytes)), packer.flush()])


@pytest.mark.parametrize("bomb", [_gzip_bomb, _zstd_bomb])
def test_an_input_that_unpacks_to_hundreds_of_times_its_size_is_refused_before_its_end(
    bomb: Callable[[int], bytes],
) -> None:
    text = Text.of(StoredBytes(bomb(300)))
    with pytest.raises(InputError, match=r"more than 500 times its size.*unpack it first"):
        inspect(text, CSV)


def test_a_small_input_may_be_packed_as_well_as_it_can_be() -> None:
    inspection = inspect(Text.of(StoredBytes(_zstd_bomb(100))), CSV)
    assert inspection.text_bytes == 100 * MIB
