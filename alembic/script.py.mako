"""${message}

Revision: ${up_revision}, after ${down_revision | comma,n}.
Keys are sa.BigInteger with sa.Identity(always=False); a table that is in use gets its indexes
CONCURRENTLY, inside `op.get_context().autocommit_block()`.
"""

from collections.abc import Sequence

import sqlalchemy as sa
import sqlmodel  # noqa: F401 - generated columns name its types

from alembic import op
${imports if imports else ""}

revision: str = ${repr(up_revision)}
down_revision: str | Sequence[str] | None = ${repr(down_revision)}
branch_labels: str | Sequence[str] | None = ${repr(branch_labels)}
depends_on: str | Sequence[str] | None = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
