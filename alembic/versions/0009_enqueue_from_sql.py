"""Enqueueing from SQL; what workers say of the kinds of jobs that they know."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# RFC 9562, section 5.7: 48 bits of milliseconds, then random ones but for version and variant. The
# random id has its variant already, and of the four bits of its version, 0100, two become 1.
NEW_JOB_ID = """
CREATE FUNCTION bulwark.new_job_id() RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT encode(
        set_bit(set_bit(
            overlay(
                uuid_send(gen_random_uuid()) PLACING
                substring(
                    int8send(floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3
                ) FROM 1
            ), 52, 1), 53, 1), 'hex')::uuid
$$
"""

PARAMETERS = """
    kind text, payload jsonb, idempotency_key text DEFAULT NULL, run_at timestamptz DEFAULT NULL,
    queue text DEFAULT NULL, priority integer DEFAULT NULL, attempts integer DEFAULT NULL,
    timeout_s integer DEFAULT NULL, actor text DEFAULT NULL, correlation_id text DEFAULT NULL
"""
TYPES = "text, jsonb, text, timestamptz, text, integer, integer, integer, text, text"

# What is wrong with the terms of a job, as a message and its remedy; no row when nothing is. What a
# worker could not read would be claimed again and again, and others with it: Python's JSON takes
# no nesting of a thousand levels and no integer of 4300 digits, and a ring's kind holds no quote.
WRONG_TERMS = r"""
RETURNS TABLE (message text, remedy text) LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT wrong.message, wrong.remedy
      FROM (SELECT octet_length(payload::text) AS bytes) AS size,
           LATERAL (VALUES
        (1, kind IS NULL OR octet_length(kind) NOT BETWEEN 1 AND 500
            OR kind COLLATE "C" ~ '["\\\s\u0001-\u001f\u007f]',
         'the kind must have 1 to 500 bytes, without quotes, spaces and backslashes',
         'Give the name of a job, as transfer_heroes.'),
        (2, payload IS NULL OR jsonb_typeof(payload) <> 'object',
         format('the payload is %s and no JSON object', coalesce(jsonb_typeof(payload), 'NULL')),
         'Give one object with the fields of the job.'),
        (3, size.bytes > 1048576,
         format('the payload of %s has %s bytes, more than 1048576', kind, size.bytes),
         'Put the rows in a file and import that.'),
        (12, size.bytes > 100 AND jsonb_path_exists(payload, 'strict $.**{100}'),
         format('the payload of %s is nested deeper than 100 levels', kind), 'Flatten it.'),
        (13, payload::text ~ '[0-9]{255}' AND jsonb_path_exists(
            payload, 'strict $.** ? (@.type() == "number" && (@ > 1e308 || @ < -1e308))'),
         format('the payload of %s has a number beyond 1e308', kind), 'Write it as a string.'),
        (4, octet_length(idempotency_key) NOT BETWEEN 1 AND 500,
         'the idempotency_key must have 1 to 500 bytes', 'Shorten it, or leave it out.'),
        (5, octet_length(actor) NOT BETWEEN 1 AND 500,
         'the actor must have 1 to 500 bytes', 'Shorten it, or leave it out.'),
        (6, octet_length(correlation_id) NOT BETWEEN 1 AND 500,
         'the correlation_id must have 1 to 500 bytes', 'Shorten it, or leave it out.'),
        (7, queue COLLATE "C" !~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$',
         format('%L is not the name of a queue', left(queue, 100)),
         'Use at most 63 letters, digits and _ . -'),
        (8, priority NOT BETWEEN -9 AND 9,
         format('priority %s is out of range', priority), 'Use -9 to 9.'),
        (9, attempts NOT BETWEEN 1 AND 1000,
         format('attempts %s is out of range', attempts), 'Use 1 to 1000.'),
        (10, timeout_s NOT BETWEEN 1 AND 604800,
         format('timeout_s %s is out of range', timeout_s), 'Use 1 to 604800.'),
        (11, run_at NOT BETWEEN '0001-01-01 00:00+00' AND '9999-12-30 00:00+00',
         format('run_at %s is out of range', run_at), 'Use a time in the years 1 to 9999.')
      ) AS wrong (place, applies, message, remedy)
     WHERE wrong.applies
     ORDER BY wrong.place LIMIT 1
$$
"""

# The digest has a byte in front that tells it from the producer's, which leaves out defaults as
# the payload's class knows them. Where the two meet, the payloads of the jobs are compared.
ENQUEUE = """
RETURNS uuid LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wrong record;
    declared bulwark.kind;
    filled jsonb;
    made uuid := bulwark.new_job_id();
    mine bytea;
    first record;
    due timestamptz := coalesce(enqueue.run_at, now());
    chosen text;
    allowed integer;
BEGIN
    SELECT * INTO wrong FROM bulwark.wrong_terms(
        enqueue.kind, enqueue.payload, enqueue.idempotency_key, enqueue.run_at, enqueue.queue,
        enqueue.priority, enqueue.attempts, enqueue.timeout_s, enqueue.actor,
        enqueue.correlation_id);
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'bulwark.enqueue: ' || wrong.message, HINT = wrong.remedy;
    END IF;
    SELECT * INTO declared FROM bulwark.kind AS known WHERE known.kind = enqueue.kind;
    chosen := coalesce(enqueue.queue, declared.queue, 'default');

    IF enqueue.idempotency_key IS NOT NULL THEN
        filled := coalesce(declared.payload_defaults, '{}') || enqueue.payload;
        mine := '\\x01'::bytea
            || sha256(convert_to(enqueue.kind || E'\\n' || filled::text, 'UTF8'));
        LOOP
            INSERT INTO bulwark.idempotency AS kept (key, job_id, digest, expires_at)
            VALUES (enqueue.idempotency_key, made, mine, now() + interval '7 days')
            ON CONFLICT ON CONSTRAINT pk_idempotency DO UPDATE
               SET job_id = excluded.job_id, digest = excluded.digest,
                   expires_at = excluded.expires_at
             WHERE kept.expires_at <= now();
            EXIT WHEN FOUND;
            SELECT kept.job_id,
                   kept.digest = mine
                   OR coalesce(
                       job.kind = enqueue.kind
                       AND coalesce(declared.payload_defaults, '{}') || job.payload = filled,
                       false
                   ) AS is_same
              INTO first
              FROM bulwark.idempotency AS kept LEFT JOIN bulwark.job AS job ON job.id = kept.job_id
             WHERE kept.key = enqueue.idempotency_key;
            IF FOUND AND first.is_same THEN
                RETURN first.job_id;
            ELSIF FOUND THEN
                RAISE EXCEPTION USING ERRCODE = 'unique_violation',
                    MESSAGE = format(
                        'bulwark.enqueue: the idempotency key %L was used with another payload, '
                        'by job %s', enqueue.idempotency_key, first.job_id),
                    HINT = 'Use a new key for another job.';
            END IF;
        END LOOP;
    END IF;

    SELECT depth_limit.most INTO allowed
      FROM bulwark.depth_limit WHERE depth_limit.queue = chosen;
    IF FOUND AND allowed <= (
        SELECT count(*) FROM (SELECT FROM bulwark.job
                               WHERE job.state = 'queued' AND job.queue = chosen
                               LIMIT allowed) AS waiting)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'program_limit_exceeded',
            MESSAGE = format('bulwark.enqueue: the queue %s is full: %s jobs wait there, '
                             'and no more may', chosen, allowed),
            HINT = 'Enqueue later, or let more wait with `bulwark limit`.';
    END IF;
    INSERT INTO bulwark.job (id, kind, payload, queue, priority, max_attempts, timeout_s, actor,
                             correlation_id, run_at, ring, next_ring_at)
    VALUES (made, enqueue.kind, enqueue.payload,
            chosen,
            coalesce(enqueue.priority, declared.priority, 0),
            coalesce(enqueue.attempts, declared.max_attempts, 5),
            coalesce(enqueue.timeout_s, declared.timeout_s, 300),
            coalesce(enqueue.actor, session_user), enqueue.correlation_id, due, 0, due);
    IF due <= now() + interval '1 minute' THEN
        PERFORM pg_notify('bulwark_jobs', '');
    END IF;
    RETURN made;
END $$
"""


def upgrade() -> None:
    op.create_table(
        "kind",
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("max_attempts", sa.SmallInteger, nullable=False),
        sa.Column("timeout_s", sa.Integer, nullable=False),
        sa.Column("payload_defaults", postgresql.JSONB, nullable=False),
        sa.Column(
            "declared_at",
            sa.TIMESTAMP(timezone=True),
            nullable=False,
            server_default=sa.func.now(),
        ),
        sa.PrimaryKeyConstraint("kind", name=op.f("pk_kind")),
        schema="bulwark",
    )
    op.add_column("worker", sa.Column("kinds", postgresql.ARRAY(sa.Text)), schema="bulwark")
    op.execute(NEW_JOB_ID)
    op.execute(f"CREATE FUNCTION bulwark.wrong_terms({PARAMETERS}) {WRONG_TERMS}")
    op.execute(f"CREATE FUNCTION bulwark.enqueue({PARAMETERS}) {ENQUEUE}")
    op.execute(f"REVOKE ALL ON FUNCTION bulwark.enqueue({TYPES}) FROM PUBLIC")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION bulwark.enqueue({TYPES})")
    op.execute(f"DROP FUNCTION bulwark.wrong_terms({TYPES})")
    op.execute("DROP FUNCTION bulwark.new_job_id()")
    op.drop_column("worker", "kinds", schema="bulwark")
    op.drop_table("kind", schema="bulwark")
