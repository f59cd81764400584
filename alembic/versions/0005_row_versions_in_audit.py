"""Which version of a row a change found: by it the changes of one row are in order."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit", sa.Column("version", sa.BigInteger), schema="bulwark")


def downgrade() -> None:
    op.drop_column("audit", "version", schema="bulwark")
