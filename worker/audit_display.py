"""How `bulwark audit verify` tells what it has found, and how it reads a head kept elsewhere."""

import re
from collections.abc import Iterator, Sequence

import typer
from rich.text import Text

from worker.audit_verification import Verification
from worker.display import grid, instant, make_console, number, to_json
from worker.exit_codes import BadInput

_HEAD = re.compile(r"([1-9][0-9]{0,17}):([0-9a-f]{64})", re.IGNORECASE)


def parse_heads(texts: Sequence[str]) -> dict[int, str]:
    """Hashes by segment. Raises BadInput."""
    heads: dict[int, str] = {}
    for text in texts:
        if (found := _HEAD.fullmatch(text.strip())) is None:
            raise BadInput(
                f"--head {text!r} is no SEGMENT:HASH, such as the `head` of the event audit.sealed."
            )
        segment, kept = int(found[1]), found[2].lower()
        if heads.setdefault(segment, kept) != kept:
            raise BadInput(f"--head names two hashes of segment {segment}.")
    return heads


def show_verification(found: Verification, *, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json(found.as_json()))
        return
    console = make_console()
    word = Text("whole", style="green") if found.is_whole else Text("not whole", style="bold red")
    console.print(word)
    for fault in found.findings.faults:
        place = "" if fault.segment is None else f"segment {fault.segment}: "
        line = f"- {fault.kind.value.replace('_', ' ')}: {place}{fault.detail}"
        console.print(Text(line), soft_wrap=True)
    if found.findings.untold:
        console.print(Text(f"... and {found.findings.untold:,} more"))
    console.print(grid(("", ""), list(_facts(found))))


def _facts(found: Verification) -> Iterator[tuple[str, str]]:
    yield "segments", number(found.segments)
    yield "rows compared", number(found.findings.rows)
    if found.findings.rotated:
        yield "rows dropped lawfully", number(found.findings.rotated)
    yield "rows not sealed yet", number(found.unsealed)
    yield "head", found.head or "nothing is sealed yet"
    yield "signatures", _signatures(found)
    for one in found.rotations:
        yield f"{one['month']:%Y-%m} dropped", f"{instant(one['at'])} by {one['role']}"


def _signatures(found: Verification) -> str:
    if found.signed_from is None:
        return "there are none; see BULWARK_SEAL_KEY"
    what = f"from segment {found.signed_from} on"
    return what if found.signatures_checked else f"{what}, not checked: set BULWARK_SEAL_KEY"
