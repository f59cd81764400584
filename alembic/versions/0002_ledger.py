"""The schema "bulwark": jobs, chunk receipts, workers, verdicts, audit, idempotency keys, spool."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

PARTITIONED = ("chunk", "verdict", "audit", "spool")

UUID_FLOOR = """
CREATE FUNCTION bulwark.uuid_floor(instant timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN rpad(lpad(to_hex((extract(epoch FROM instant) * 1000)::bigint), 12, '0'), 32, '0')::uuid
"""

# The default partition takes ids of any other time, so that a strange clock loses nothing. A new
# partition is attached only when none of its ids are in the default one.
ENSURE_PARTITIONS = """
CREATE FUNCTION bulwark.ensure_partitions(months integer DEFAULT 3) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, bulwark
AS $$
DECLARE
    parent text;
    child text;
    first timestamptz;
    low uuid;
    high uuid;
    taken boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('bulwark.ensure_partitions', 0));
    FOREACH parent IN ARRAY ARRAY['chunk', 'verdict', 'audit', 'spool'] LOOP
        FOR month IN 0..months LOOP
            first := date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'
                     + make_interval(months => month);
            first := date_trunc('month', first AT TIME ZONE 'UTC') AT TIME ZONE 'UTC';
            child := format('%s_%s', parent, to_char(first AT TIME ZONE 'UTC', 'YYYY_MM'));
            CONTINUE WHEN to_regclass('bulwark.' || child) IS NOT NULL;
            low := bulwark.uuid_floor(first);
            high := bulwark.uuid_floor(
                ((first AT TIME ZONE 'UTC') + interval '1 month') AT TIME ZONE 'UTC');
            EXECUTE format(
                'SELECT EXISTS (SELECT FROM bulwark.%I WHERE job_id >= %L AND job_id < %L)',
                parent || '_default', low, high) INTO taken;
            CONTINUE WHEN taken;
            EXECUTE format('CREATE TABLE bulwark.%I (LIKE bulwark.%I INCLUDING ALL)',
                           child, parent);
            EXECUTE format('ALTER TABLE bulwark.%I ATTACH PARTITION bulwark.%I '
                           'FOR VALUES FROM (%L) TO (%L)', parent, child, low, high);
        END LOOP;
    END LOOP;
END
$$
"""

JOB_TRANSITION = """
CREATE FUNCTION bulwark.check_job_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT (
        OLD.state = 'queued' AND NEW.state IN ('running', 'cancelled')
        OR OLD.state = 'running' AND NEW.state IN ('queued', 'succeeded', 'failed', 'cancelled')
    ) THEN
        RAISE EXCEPTION 'job % cannot go from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation', CONSTRAINT = 'job_transition';
    END IF;
    RETURN NEW;
END
$$
"""

JOB_TRANSITION_TRIGGER = """
CREATE TRIGGER job_transition BEFORE UPDATE OF state ON bulwark.job
FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state)
EXECUTE FUNCTION bulwark.check_job_transition()
"""


def instant(name: str, *, required: bool = False, now: bool = False) -> sa.Column:
    return sa.Column(
        name,
        sa.TIMESTAMP(timezone=True),
        nullable=not (required or now),
        server_default=sa.func.now() if now else None,
    )


def create_job() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("payload", postgresql.JSONB, nullable=False),
        sa.Column("queue", sa.Text, nullable=False, server_default="default"),
        sa.Column("priority", sa.SmallInteger, nullable=False, server_default="0"),
        sa.Column("state", sa.Text, nullable=False, server_default="queued"),
        sa.Column("reason", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("outcome", postgresql.JSONB),
        instant("run_at", now=True),
        sa.Column("attempt", sa.SmallInteger, nullable=False, server_default="0"),
        sa.Column("max_attempts", sa.SmallInteger, nullable=False),
        sa.Column("timeout_s", sa.Integer, nullable=False),
        sa.Column("actor", sa.Text),
        sa.Column("correlation_id", sa.Text),
        instant("created_at", now=True),
        instant("queued_at", now=True),
        instant("started_at"),
        instant("finished_at"),
        sa.Column("claim_id", sa.Uuid),
        sa.Column("worker_id", sa.Uuid),
        instant("claimed_at"),
        sa.Column("crashes", sa.SmallInteger, nullable=False, server_default="0"),
        sa.Column("ring", sa.Integer, nullable=False, server_default="0"),
        sa.Column("next_ring_at", sa.TIMESTAMP(timezone=True), server_default=sa.func.now()),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_job_state"),
        ),
        sa.CheckConstraint("priority BETWEEN -9 AND 9", name=op.f("ck_job_priority")),
        sa.CheckConstraint("max_attempts >= 1 AND attempt >= 0", name=op.f("ck_job_attempts")),
        sa.CheckConstraint("timeout_s >= 1", name=op.f("ck_job_timeout")),
        sa.CheckConstraint(
            "state <> 'running' OR (claim_id IS NOT NULL AND worker_id IS NOT NULL)",
            name=op.f("ck_job_claimed"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
        schema="bulwark",
    )
    op.create_index(
        "ix_job_next_ring_at",
        "job",
        ["next_ring_at"],
        schema="bulwark",
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_job_worker_id",
        "job",
        ["worker_id"],
        schema="bulwark",
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index("ix_job_state_id", "job", ["state", "id"], schema="bulwark")
    op.execute(JOB_TRANSITION)
    op.execute(JOB_TRANSITION_TRIGGER)


def create_worker() -> None:
    op.create_table(
        "worker",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("queues", postgresql.ARRAY(sa.Text), nullable=False),
        instant("started_at", now=True),
        instant("seen_at", now=True),
        instant("previous_seen_at", now=True),
        sa.Column("claims", postgresql.ARRAY(sa.Uuid), nullable=False, server_default="{}"),
        sa.Column(
            "previous_claims", postgresql.ARRAY(sa.Uuid), nullable=False, server_default="{}"
        ),
        instant("ended_at"),
        sa.Column("end_reason", sa.Text),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_worker")),
        schema="bulwark",
    )
    op.create_index(
        "ix_worker_seen_at",
        "worker",
        ["seen_at"],
        schema="bulwark",
        postgresql_where=sa.text("ended_at IS NULL"),
    )


def create_chunk() -> None:
    op.create_table(
        "chunk",
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("chunk_no", sa.Integer, nullable=False),
        sa.Column("claim_id", sa.Uuid, nullable=False),
        sa.Column("first_row", sa.BigInteger, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("filtered", sa.Integer, nullable=False),
        sa.Column("start_byte", sa.BigInteger, nullable=False),
        sa.Column("end_byte", sa.BigInteger, nullable=False),
        sa.Column("first_line", sa.BigInteger, nullable=False),
        sa.Column("next_line", sa.BigInteger, nullable=False),
        sa.Column("counts", postgresql.JSONB, nullable=False),
        sa.Column("detail", postgresql.JSONB),
        instant("committed_at", now=True),
        sa.PrimaryKeyConstraint("job_id", "chunk_no", name=op.f("pk_chunk")),
        schema="bulwark",
        postgresql_partition_by="RANGE (job_id)",
    )


def create_verdict() -> None:
    op.create_table(
        "verdict",
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("row_no", sa.BigInteger, nullable=False),
        sa.Column("chunk_no", sa.Integer, nullable=False),
        sa.Column("line", sa.BigInteger),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("code", sa.Text, nullable=False),
        sa.Column("column", sa.Text),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("raw", sa.LargeBinary),
        sa.CheckConstraint(
            "verdict IN ('rejected', 'conflict', 'missing', 'kept')",
            name=op.f("ck_verdict_verdict"),
        ),
        sa.PrimaryKeyConstraint("job_id", "row_no", name=op.f("pk_verdict")),
        schema="bulwark",
        postgresql_partition_by="RANGE (job_id)",
    )


def create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("chunk_no", sa.Integer, nullable=False),
        sa.Column("entry_no", sa.Integer, nullable=False),
        instant("at", now=True),
        sa.Column("claim_id", sa.Uuid, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("actor", sa.Text),
        sa.Column("correlation_id", sa.Text),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("table_name", sa.Text, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("keys", postgresql.JSONB, nullable=False),
        sa.Column("before", postgresql.JSONB),
        sa.Column("before_sensitive", postgresql.JSONB),
        sa.PrimaryKeyConstraint("job_id", "chunk_no", "entry_no", name=op.f("pk_audit")),
        schema="bulwark",
        postgresql_partition_by="RANGE (job_id)",
    )
    op.execute(
        "ALTER TABLE bulwark.audit ADD COLUMN xid xid8 NOT NULL DEFAULT pg_current_xact_id()"
    )


def create_idempotency() -> None:
    op.create_table(
        "idempotency",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        instant("expires_at", required=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency")),
        schema="bulwark",
    )
    op.create_index("ix_idempotency_expires_at", "idempotency", ["expires_at"], schema="bulwark")


def create_spool() -> None:
    op.create_table(
        "spool",
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("part_no", sa.Integer, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "part_no", name=op.f("pk_spool")),
        schema="bulwark",
        postgresql_partition_by="RANGE (job_id)",
    )
    op.execute("ALTER TABLE bulwark.spool ALTER COLUMN data SET STORAGE EXTERNAL")


def upgrade() -> None:
    op.execute("CREATE SCHEMA IF NOT EXISTS bulwark")
    create_job()
    create_worker()
    create_chunk()
    create_verdict()
    create_audit()
    create_idempotency()
    create_spool()
    for parent in PARTITIONED:
        op.execute(f"CREATE TABLE bulwark.{parent}_default PARTITION OF bulwark.{parent} DEFAULT")
    op.execute(UUID_FLOOR)
    op.execute(ENSURE_PARTITIONS)
    op.execute("SELECT bulwark.ensure_partitions()")


def downgrade() -> None:
    op.execute("DROP FUNCTION bulwark.ensure_partitions(integer)")
    op.execute("DROP FUNCTION bulwark.uuid_floor(timestamptz)")
    for table in (*PARTITIONED, "idempotency", "worker", "job"):
        op.drop_table(table, schema="bulwark")
    op.execute("DROP FUNCTION bulwark.check_job_transition()")
    op.execute("DROP SCHEMA bulwark")
