"""Purging: where it goes on, why it pauses, who stopped it; and how the ledger is rotated."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

SOFT_DELETABLE = ("team", "hero", "membership", "transfer")
DELETED = sa.text("deleted_at IS NOT NULL")

# A month goes when all of it is older than asked. One stays in which a job has its ids that may
# still be run: it looks there for what it has done, and a failed one may be run again.
DROP_PARTITIONS = """
CREATE FUNCTION bulwark.drop_partitions(parent text, before timestamptz) RETURNS text[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, bulwark
AS $$
DECLARE
    child text;
    low timestamptz;
    high timestamptz;
    dropped text[] := '{}';
BEGIN
    IF parent <> ALL (ARRAY['chunk', 'verdict', 'audit', 'spool']) THEN
        RAISE EXCEPTION 'bulwark.% has no partitions by month', parent;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('bulwark.ensure_partitions', 0));
    FOR child IN
        SELECT c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
         WHERE i.inhparent = to_regclass('bulwark.' || parent)
           AND c.relname ~ ('^' || parent || '_[0-9]{4}_[0-9]{2}$')
         ORDER BY c.relname
    LOOP
        low := to_timestamp(right(child, 7), 'YYYY_MM')::date::timestamp AT TIME ZONE 'UTC';
        high := ((low AT TIME ZONE 'UTC') + interval '1 month') AT TIME ZONE 'UTC';
        CONTINUE WHEN high > least(before, now());
        CONTINUE WHEN EXISTS (
            SELECT FROM bulwark.job
             WHERE id >= bulwark.uuid_floor(low) AND id < bulwark.uuid_floor(high)
               AND (state IN ('queued', 'running')
                    OR state = 'failed' AND parent IN ('chunk', 'spool')));
        EXECUTE format('DROP TABLE bulwark.%I', child);
        dropped := dropped || child;
    END LOOP;
    RETURN dropped;
END
$$
"""

DROP_STRAYS = """
CREATE FUNCTION bulwark.drop_strays(parent text, before timestamptz, most integer)
RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, bulwark
AS $$
DECLARE
    dropped bigint;
BEGIN
    IF parent <> ALL (ARRAY['chunk', 'verdict', 'audit', 'spool']) THEN
        RAISE EXCEPTION 'bulwark.% has no default partition', parent;
    END IF;
    EXECUTE format(
        'DELETE FROM bulwark.%1$I WHERE ctid = ANY (ARRAY('
        '    SELECT s.ctid FROM bulwark.%1$I AS s WHERE s.job_id < bulwark.uuid_floor($1)'
        '       AND NOT EXISTS (SELECT FROM bulwark.job AS j WHERE j.id = s.job_id'
        '           AND (j.state IN (''queued'', ''running'') OR j.state = ''failed'' AND $3))'
        '     LIMIT $2))', parent || '_default')
    USING least(before, now()), most, parent IN ('chunk', 'spool');
    GET DIAGNOSTICS dropped = ROW_COUNT;
    RETURN dropped;
END
$$
"""


def index_deleted_rows(*columns: str, instead_of: tuple[str, ...]) -> None:
    for table in SOFT_DELETABLE:
        op.drop_index(f"ix_{table}_{'_'.join(instead_of)}", table)
        name = f"ix_{table}_{'_'.join(columns)}"
        op.create_index(name, table, list(columns), postgresql_where=DELETED)


def upgrade() -> None:
    index_deleted_rows("deleted_at", "id", instead_of=("deleted_at",))
    op.add_column("progress", sa.Column("note", sa.Text), schema="bulwark")
    op.create_table(
        "halt",
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("actor", sa.Text),
        sa.Column("at", sa.TIMESTAMP(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("kind", name=op.f("pk_halt")),
        schema="bulwark",
    )
    op.execute(DROP_PARTITIONS)
    op.execute(DROP_STRAYS)


def downgrade() -> None:
    op.execute("DROP FUNCTION bulwark.drop_strays(text, timestamptz, integer)")
    op.execute("DROP FUNCTION bulwark.drop_partitions(text, timestamptz)")
    op.drop_table("halt", schema="bulwark")
    op.drop_column("progress", "note", schema="bulwark")
    index_deleted_rows("deleted_at", instead_of=("deleted_at", "id"))
