"""Whether the seals are a whole chain: each continues the one before, and none was made up."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from db.ledger.seal import FORM, NOTHING, Block, Seal
from db.ledger.seal_check import Fault, FaultKind


@dataclass
class Chain:
    """Takes the seals in order; `heads` are hashes by segment that were kept elsewhere."""

    keys: Sequence[str]
    heads: Mapping[int, str]
    last: Seal | None = None
    signed_from: int | None = None

    def link(self, one: Seal, blocks: Sequence[Block], rotations: bytes) -> Iterator[Fault]:
        """What is wrong with the next seal: with itself, or with its place in the chain."""
        yield from self._place(one)
        if one.form != FORM:
            yield _forged(one, f"it is of the form {one.form}, which this program does not know")
        elif one.hash != one.digest(blocks):
            yield _forged(one, "what its seal says was altered")
        elif one.rows != sum(block.rows for block in blocks):
            yield _forged(one, "its blocks have not as many rows as it says")
        if one.rotations != rotations:
            sentence = "the records of months that were dropped were altered"
            yield Fault(FaultKind.FORGED_ROTATION, one.segment, sentence)
        if (kept := self.heads.get(one.segment)) is not None and kept != one.hash.hex():
            sentence = f"its hash is {one.hash.hex()}, and {kept} was kept elsewhere"
            yield Fault(FaultKind.FORGED_HEAD, one.segment, sentence)
        yield from self._signed(one)
        self.last = one

    def end(self) -> Iterator[Fault]:
        """What is missing behind the last seal."""
        reached = 0 if self.last is None else self.last.segment
        for segment in sorted(self.heads):
            if segment > reached:
                sentence = "its hash was kept elsewhere, and there is no such segment"
                yield Fault(FaultKind.REMOVED_SEGMENT, segment, sentence)
        if self.keys and self.last is not None and self.last.mac is None:
            sentence = "the last segment is not signed: `bulwark audit seal` signs a further one"
            yield Fault(FaultKind.UNSIGNED, self.last.segment, sentence)

    def _place(self, one: Seal) -> Iterator[Fault]:
        following = 1 if self.last is None else self.last.segment + 1
        begin = 0 if self.last is None else self.last.below_xid
        if one.segment != following:
            span = f"the transactions from {begin} up to {one.from_xid}"
            for segment in range(following, one.segment):
                sentence = f"it is missing, and with it the proof of {span}"
                yield Fault(FaultKind.REMOVED_SEGMENT, segment, sentence)
            return
        before = NOTHING if self.last is None else self.last.hash
        if (one.from_xid, one.previous) != (begin, before):
            yield _forged(one, "it does not continue the segment before")

    def _signed(self, one: Seal) -> Iterator[Fault]:
        if one.mac is None:
            if self.signed_from is not None:
                sentence = "it is not signed, though segments before it are"
                yield Fault(FaultKind.UNSIGNED, one.segment, sentence)
            return
        if self.signed_from is None:
            self.signed_from = one.segment
        if self.keys and not one.is_signed_with(self.keys):
            yield _forged(one, "it is signed with none of the keys in BULWARK_SEAL_KEY")


def _forged(one: Seal, sentence: str) -> Fault:
    return Fault(FaultKind.FORGED_SEAL, one.segment, sentence)
