"""Seals over the audit, a record of the months that were rotated, and what roles need."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

DEFINER = "LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, {path}"
FUNCTIONS = (
    "ensure_partitions(integer)",
    "drop_partitions(text, timestamptz)",
    "drop_strays(text, timestamptz, integer)",
)
"""What runs as the owner, and is for workers alone."""

# A UUIDv7 begins with the milliseconds since 1970; no other id leads behind the year 9999. STRICT
# would keep it from being inlined, since least() is not.
MONTH_OF = """
CREATE FUNCTION bulwark.month_of(id uuid) RETURNS date
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN date_trunc('month', to_timestamp(least(
    ('x' || encode(substr(uuid_send(id), 1, 6), 'hex'))::bit(48)::bigint / 1000, 253370764800
)) AT TIME ZONE 'UTC')::date
"""

DROP_PARTITIONS = """
CREATE OR REPLACE FUNCTION bulwark.drop_partitions(parent text, before timestamptz) RETURNS text[]
{definer}
AS $$
DECLARE
    child text;
    low timestamptz;
    high timestamptz;
    dropped text[] := '{{}}';
BEGIN
    IF parent <> ALL (ARRAY['chunk', 'verdict', 'audit', 'spool']) THEN
        RAISE EXCEPTION 'bulwark.% has no partitions by month', parent;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('bulwark.ensure_partitions', 0));
    FOR child IN
        SELECT c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
         WHERE i.inhparent = to_regclass('bulwark.' || parent)
           AND c.relname ~ ('^' || parent || '_[0-9]{{4}}_[0-9]{{2}}$')
         ORDER BY c.relname
    LOOP
        low := to_timestamp(right(child, 7), 'YYYY_MM')::date::timestamp AT TIME ZONE 'UTC';
        high := ((low AT TIME ZONE 'UTC') + interval '1 month') AT TIME ZONE 'UTC';
        CONTINUE WHEN high > least(before, now());
        CONTINUE WHEN EXISTS (
            SELECT FROM bulwark.job
             WHERE id >= bulwark.uuid_floor(low) AND id < bulwark.uuid_floor(high)
               AND (state IN ('queued', 'running')
                    OR state IN ('failed', 'cancelled') AND parent IN ('chunk', 'spool')));
        EXECUTE format('DROP TABLE bulwark.%I', child);
        dropped := dropped || child;{note}
    END LOOP;
    RETURN dropped;
END
$$
"""
NOTE_PARTITION = """
        IF parent = 'audit' THEN
            INSERT INTO bulwark.rotation (month) VALUES ((low AT TIME ZONE 'UTC')::date);
        END IF;"""

_STRAYS = """
CREATE OR REPLACE FUNCTION bulwark.drop_strays(parent text, before timestamptz, most integer)
RETURNS bigint
{definer}
AS $$
DECLARE
    dropped bigint;
BEGIN
    IF parent <> ALL (ARRAY['chunk', 'verdict', 'audit', 'spool']) THEN
        RAISE EXCEPTION 'bulwark.% has no default partition', parent;
    END IF;
    EXECUTE format(
        {head}
        'DELETE FROM bulwark.%1$I WHERE ctid = ANY (ARRAY('
        '    SELECT s.ctid FROM bulwark.%1$I AS s WHERE s.job_id < bulwark.uuid_floor($1)'
        '       AND NOT EXISTS (SELECT FROM bulwark.job AS j WHERE j.id = s.job_id'
        '           AND (j.state IN (''queued'', ''running'')'
        '                OR j.state IN (''failed'', ''cancelled'') AND $3))'
        '     LIMIT $2)){tail}', parent || '_default')
    {into}USING least(before, now()), most, parent IN ('chunk', 'spool'){more};{count}
    RETURN dropped;
END
$$
"""
NOTED_STRAYS = {
    "head": "'WITH gone AS ('",
    "tail": " RETURNING job_id), noted AS ('\n"
    "        'INSERT INTO bulwark.rotation (month)'\n"
    "        '    SELECT DISTINCT bulwark.month_of(job_id) FROM gone WHERE $4 RETURNING month)'\n"
    "        'SELECT count(*) FROM gone",
    "into": "INTO dropped ",
    "more": ", parent = 'audit'",
    "count": "",
}
PLAIN_STRAYS = {
    "head": "",
    "tail": "",
    "into": "",
    "more": "",
    "count": "\n    GET DIAGNOSTICS dropped = ROW_COUNT;",
}


# What reports show of a job's payload, for roles that may not read payloads: they may hold rows.
INPUT_OF = """
CREATE FUNCTION bulwark.input_of(id uuid) RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object(
               'table', j.payload -> 'table',
               'name', coalesce(j.payload -> 'source' ->> 'name', j.payload -> 'source' ->> 'path'),
               'text_bytes', j.payload -> 'source' -> 'text_bytes',
               'is_given', coalesce(jsonb_typeof(j.payload -> 'source') = 'object', false)
                        OR coalesce(jsonb_typeof(j.payload -> 'rows') = 'array', false))
      FROM bulwark.job AS j WHERE j.id = $1
$$
"""


def xid8(name: str) -> str:
    return f"ADD COLUMN {name} xid8 NOT NULL"


def instant(name: str) -> sa.Column:
    return sa.Column(
        name, sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()
    )


def create_seal() -> None:
    op.create_table(
        "seal",
        sa.Column("segment", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("form", sa.SmallInteger, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("rotations", sa.LargeBinary, nullable=False),
        sa.Column("previous", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("mac", sa.LargeBinary),
        instant("sealed_at"),
        sa.PrimaryKeyConstraint("segment", name=op.f("pk_seal")),
        schema="bulwark",
    )
    op.execute(f"ALTER TABLE bulwark.seal {xid8('from_xid')}, {xid8('below_xid')}")
    op.create_table(
        "seal_block",
        sa.Column("segment", sa.BigInteger, nullable=False),
        sa.Column("block_no", sa.Integer, nullable=False),
        sa.Column("month", sa.Date, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("first_key", sa.LargeBinary, nullable=False),
        sa.Column("last_key", sa.LargeBinary, nullable=False),
        sa.Column("salt", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("marks", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("segment", "block_no", name=op.f("pk_seal_block")),
        schema="bulwark",
    )
    # Hashes do not compress: PostgreSQL need not try.
    op.execute("ALTER TABLE bulwark.seal_block ALTER COLUMN marks SET STORAGE EXTERNAL")


def create_rotation() -> None:
    op.create_table(
        "rotation",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("month", sa.Date, nullable=False),
        instant("at"),
        sa.Column("role", sa.Text, nullable=False, server_default=sa.text("SESSION_USER")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rotation")),
        schema="bulwark",
    )
    op.execute(
        f"ALTER TABLE bulwark.rotation {xid8('xid')} DEFAULT pg_current_xact_id()",
    )


def make_functions(note: str, strays: dict[str, str], path: str) -> None:
    definer = DEFINER.format(path=path)
    op.execute(DROP_PARTITIONS.format(definer=definer, note=note))
    op.execute(_STRAYS.format(definer=definer, **strays))
    op.execute(
        f"ALTER FUNCTION bulwark.ensure_partitions(integer) SET search_path = pg_catalog, {path}"
    )


def upgrade() -> None:
    create_seal()
    create_rotation()
    op.create_index("ix_audit_xid", "audit", ["xid"], schema="bulwark")
    op.execute(MONTH_OF)
    op.execute(INPUT_OF)
    make_functions(NOTE_PARTITION, NOTED_STRAYS, "bulwark, pg_temp")
    for function in (*FUNCTIONS, "input_of(uuid)"):
        op.execute(f"REVOKE EXECUTE ON FUNCTION bulwark.{function} FROM PUBLIC")


def downgrade() -> None:
    for function in FUNCTIONS:
        op.execute(f"GRANT EXECUTE ON FUNCTION bulwark.{function} TO PUBLIC")
    make_functions("", PLAIN_STRAYS, "bulwark")
    op.execute("DROP FUNCTION bulwark.input_of(uuid)")
    op.execute("DROP FUNCTION bulwark.month_of(uuid)")
    op.drop_index("ix_audit_xid", "audit", schema="bulwark")
    for table in ("rotation", "seal_block", "seal"):
        op.drop_table(table, schema="bulwark")
