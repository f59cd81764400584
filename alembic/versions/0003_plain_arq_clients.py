"""Messages of plain arq clients: the jobs made of them, and those of which none could be made."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("arq_id", sa.Text), schema="bulwark")
    op.add_column("job", sa.Column("arq_enqueued_ms", sa.BigInteger), schema="bulwark")
    op.create_index(
        "uq_job_arq_id_arq_enqueued_ms",
        "job",
        ["arq_id", "arq_enqueued_ms"],
        unique=True,
        schema="bulwark",
        postgresql_where=sa.text("arq_id IS NOT NULL"),
    )
    op.create_table(
        "parked",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("arq_id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text),
        sa.Column("message", sa.LargeBinary),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column(
            "parked_at", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()
        ),
        sa.Column("job_id", sa.Uuid),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_parked")),
        schema="bulwark",
    )
    op.create_index(
        "uq_parked_arq_id_digest", "parked", ["arq_id", "digest"], unique=True, schema="bulwark"
    )


def downgrade() -> None:
    op.drop_table("parked", schema="bulwark")
    op.drop_index("uq_job_arq_id_arq_enqueued_ms", "job", schema="bulwark")
    op.drop_column("job", "arq_enqueued_ms", schema="bulwark")
    op.drop_column("job", "arq_id", schema="bulwark")
