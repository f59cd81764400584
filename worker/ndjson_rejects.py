"""Rows of NDJSON that a job did not take, as lines to be mended."""

import json
import re

from db.ledger.verdict import RowVerdict
from jobs._mapping import OWN_PREFIX

_OWN_KEY = rb'(?<!\\)"%s(?:line|reason)"\s*:\s*(?:\d+|"(?:[^"\\]|\\.)*+")' % OWN_PREFIX.encode()
_OWN = re.compile(rb"\s*,\s*%s|%s\s*,?\s*" % (_OWN_KEY, _OWN_KEY))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def mendable(one: RowVerdict) -> bytes:
    """The line as it came, with its number and reason before its first key.

    A line that is broken stays so until it is mended, and spoils no other. One that is no object
    stands there without a reason, and one of which only the beginning was kept as a text, which no
    import takes.
    """
    raw = (one.raw or b"").removeprefix(_BYTE_ORDER_MARK).strip(b" \t\r\n")
    if not raw.startswith(b"{"):
        return raw + b"\n"
    if one.code == "row_too_large":
        return _dumped(raw.decode(errors="backslashreplace")) + b"\n"
    rest = _OWN.sub(b"", raw)[1:].lstrip(b" \t")
    own = {f"{OWN_PREFIX}line": one.line, f"{OWN_PREFIX}reason": " ".join(one.message.split())}
    comma = b"" if rest.startswith(b"}") else b", "
    return _dumped(own)[:-1] + comma + rest + b"\n"


def _dumped(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")
