"""Settings: what is read from where, and what each mistake is called."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from redis.asyncio.connection import parse_url
from sqlalchemy.engine import make_url

from db.engine import PoolProfile
from worker.sentinel import parse_sentinel_url
from worker.settings import Settings, SettingsError, load_settings, variable

ROOT = Path(__file__).parents[2]
PASSWORD = "correct-horse"
DATABASE_URL = f"postgresql://ann:{PASSWORD}@db.example:6432/shop"
REDIS_URL = f"rediss://:{PASSWORD}@redis.example:6380/3"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without settings, and an empty current folder."""
    import os

    for name in list(os.environ):
        if name.upper().startswith("BULWARK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def problems(monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[str, ...]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return caught.value.problems


def problem(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    (only,) = problems(monkeypatch, **environment)
    return only


def test_without_any_variable_the_defaults_hold() -> None:
    settings = load_settings()

    assert settings.database_url is None
    assert settings.queues == ("default",)
    assert settings.pool_profile is PoolProfile.MEDIUM
    assert settings.lost_after_s >= 2 * settings.beat_interval_s


def test_the_environment_wins_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("BULWARK_MAX_JOBS=3\nBULWARK_LOG_LEVEL=error\n")
    monkeypatch.setenv("BULWARK_MAX_JOBS", "4")

    settings = load_settings()

    assert (settings.max_jobs, settings.log_level) == (4, "error")


def test_the_file_may_hold_variables_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SECRET_KEY=x\nPOSTGRES_USER=y\n")

    assert load_settings() == Settings()


@pytest.mark.parametrize("text", ["mail, reports", '["mail", "reports"]', "mail,reports,"])
def test_a_list_is_separated_by_commas_or_is_json(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("BULWARK_QUEUES", text)

    assert load_settings().queues == ("mail", "reports")


@pytest.mark.parametrize("text", ["hero=30, team=0", '{"hero": 30, "team": 0}'])
def test_retention_is_told_by_table_as_pairs_or_json(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("BULWARK_RETENTION_DAYS", text)

    assert load_settings().retention_days == {"hero": 30, "team": 0}


@pytest.mark.parametrize("text", ["hero", "hero=soon", "hero=-1", "hero=1,hero=2", "{hero", "=5"])
def test_a_retention_that_is_no_number_of_days_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    assert "BULWARK_RETENTION_DAYS" in problem(monkeypatch, BULWARK_RETENTION_DAYS=text)


def test_the_ledgers_retention_is_for_its_tables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'jobs'" in problem(monkeypatch, BULWARK_LEDGER_RETENTION_DAYS="jobs=30")


def test_import_folders_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BULWARK_IMPORT_FOLDERS", "drop,/srv/in")

    assert load_settings().import_folders == (tmp_path / "drop", Path("/srv/in"))


def test_folders_of_objects_are_kept_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULWARK_IMPORT_FOLDERS", "s3://bucket/in,/srv/in,az://box")

    assert load_settings().import_folders == ("s3://bucket/in", Path("/srv/in"), "az://box")


@pytest.mark.parametrize("place", ["http://host/in", "s3://", "ftp://host"])
def test_a_place_that_no_worker_could_read_from_is_refused(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("BULWARK_IMPORT_FOLDERS", place)

    with pytest.raises(SettingsError, match="is no place of files or objects"):
        load_settings()


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULWARK_REDIS_URL", "")
    monkeypatch.setenv("BULWARK_QUEUES", "")

    assert load_settings() == Settings(redis_url=None, queues=("default",))


def test_upper_case_is_understood_where_only_words_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BULWARK_LOG_LEVEL", "WARNING")
    monkeypatch.setenv("BULWARK_POOL_PROFILE", "Heavy")

    settings = load_settings()

    assert (settings.log_level, settings.pool_profile) == ("warning", PoolProfile.HEAVY)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+asyncpg"])
def test_a_database_url_gets_the_driver_that_is_used(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_URL", DATABASE_URL.replace("postgresql", scheme))

    expected = DATABASE_URL.replace("postgresql:", "postgresql+asyncpg:")
    assert load_settings().require_database() == expected


def test_both_servers_are_given_with_their_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("BULWARK_REDIS_URL", REDIS_URL)

    servers = load_settings().require_servers()

    assert PASSWORD in servers.database_url
    assert servers.redis_url == REDIS_URL


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ("ssl=require", "verify-full"),
        ("ssl=true", "verify-full"),
        ("ssl=verify-full", "verify-full"),
        ("ssl=require&ssl_check_hostname=false", "verify-ca"),
        ("ssl=require&ssl_cert_reqs=none", "require"),
        ("ssl=require&ssl_cert_reqs=none&ssl_check_hostname=false", "require"),
    ],
)
def test_with_tls_the_host_of_postgresql_is_checked_unless_the_address_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, options: str, mode: str
) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_URL", f"{DATABASE_URL}?{options}&timeout=5")

    url = make_url(load_settings().require_database())

    assert url.query == {"ssl": mode, "timeout": "5"}


AWKWARD = "a@b:c/d%41?e#f g+h'\"\\&[é"


def test_passwords_of_any_signs_may_stand_beside_their_urls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_URL", "postgresql://ann@db.example/shop?ssl=require")
    monkeypatch.setenv("BULWARK_DATABASE_PASSWORD", AWKWARD)
    monkeypatch.setenv("BULWARK_REDIS_URL", "rediss://redis.example:6380/3")
    monkeypatch.setenv("BULWARK_REDIS_PASSWORD", AWKWARD)

    servers = load_settings().require_servers()
    postgres, redis = make_url(servers.database_url), parse_url(servers.redis_url)

    assert (postgres.username, postgres.password, postgres.host, postgres.database) == (
        "ann",
        AWKWARD,
        "db.example",
        "shop",
    )
    assert postgres.query == {"ssl": "verify-full"}
    assert (redis["password"], redis["host"], redis["port"], redis["db"]) == (
        AWKWARD,
        "redis.example",
        6380,
        3,
    )


@pytest.mark.parametrize(
    "url", ["redis://bob@redis.example", "unix://bob@/run/redis.sock?db=1", "redis://bob@[::1]:1/0"]
)
def test_a_redis_user_keeps_the_name_beside_the_password(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("BULWARK_REDIS_URL", url)
    monkeypatch.setenv("BULWARK_REDIS_PASSWORD", AWKWARD)

    found = parse_url(load_settings().require_servers().redis_url)

    assert found == {**parse_url(url), "password": AWKWARD}


def test_the_password_of_a_master_stands_beside_its_sentinels_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("BULWARK_REDIS_URL", "redis+sentinel://one:1,two:2/mymaster/3")
    monkeypatch.setenv("BULWARK_REDIS_PASSWORD", AWKWARD)

    address = parse_sentinel_url(load_settings().require_servers().redis_url)

    assert address.sentinels == [("one", 1), ("two", 2)]
    assert parse_url(address.url)["password"] == AWKWARD


def test_the_password_in_a_url_is_the_one_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("BULWARK_DATABASE_PASSWORD", AWKWARD)
    monkeypatch.setenv("BULWARK_REDIS_URL", REDIS_URL)
    monkeypatch.setenv("BULWARK_REDIS_PASSWORD", AWKWARD)

    servers = load_settings().require_servers()

    assert make_url(servers.database_url).password == PASSWORD
    assert servers.redis_url == REDIS_URL


def test_a_password_beside_a_url_without_a_user_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = problem(
        monkeypatch,
        BULWARK_DATABASE_URL="postgresql://db.example/shop",
        BULWARK_DATABASE_PASSWORD=PASSWORD,
    )

    assert "it names no user that BULWARK_DATABASE_PASSWORD is the password of" in told
    assert PASSWORD not in told


def test_the_password_of_the_database_stands_beside_the_url_to_listen_at_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_PASSWORD", AWKWARD)
    monkeypatch.setenv("BULWARK_LISTEN_URL", "postgresql://ann@direct.example/shop")

    secret = load_settings().listen_url

    assert secret is not None
    url = make_url(secret.get_secret_value())
    assert (url.host, url.password, url.drivername) == (
        "direct.example",
        AWKWARD,
        "postgresql+asyncpg",
    )


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULWARK_DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("BULWARK_REDIS_URL", "redis://redis.example")
    monkeypatch.setenv("BULWARK_REDIS_PASSWORD", PASSWORD)
    monkeypatch.setenv("BULWARK_LISTEN_URL", DATABASE_URL)

    settings = load_settings()

    assert PASSWORD not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().max_jobs = 3  # type: ignore[misc]  # what is refused


@pytest.mark.parametrize("missing", ["BULWARK_DATABASE_URL", "BULWARK_REDIS_URL"])
def test_a_missing_server_is_named_with_an_example(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    urls = {"BULWARK_DATABASE_URL": DATABASE_URL, "BULWARK_REDIS_URL": REDIS_URL}
    (present,) = set(urls) - {missing}
    monkeypatch.setenv(present, urls[present])

    with pytest.raises(SettingsError) as caught:
        load_settings().require_servers()

    assert re.search(rf"Set {missing} \(such as \w+://", str(caught.value))
    assert present not in str(caught.value)
    assert "bulwark dev" in str(caught.value)


def test_a_missing_database_is_named_where_only_it_is_needed() -> None:
    with pytest.raises(SettingsError, match=r"Set BULWARK_DATABASE_URL \(such as postgresql://"):
        load_settings().require_database()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("BULWARK_DATABSE_URL", "BULWARK_DATABASE_URL"),
        ("BULWARK_QUEUE", "BULWARK_QUEUES"),
        ("BULWARK_max_jobs", "BULWARK_MAX_JOBS"),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_a_near_one(
    monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:
    told = problem(monkeypatch, **{name: "1"})

    assert told == f"{name} is not a setting: did you mean {near}?"


def test_an_unknown_variable_near_nothing_lists_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told = problem(monkeypatch, BULWARK_QQQ="1")

    assert told.startswith("BULWARK_QQQ is not a setting; there are BULWARK_")
    assert all(variable(name) in told for name in Settings.model_fields)


def test_an_unknown_variable_in_the_file_is_an_error_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("BULWARK_MAX_JOB=3\n")

    assert problem(monkeypatch).startswith("BULWARK_MAX_JOB in .env is not a setting")


def test_a_line_without_a_value_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("BULWARK_MAX_JOBS\n")

    assert "BULWARK_MAX_JOBS in .env has no value" in problem(monkeypatch)


def test_a_file_that_is_not_utf8_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_bytes(b"BULWARK_QUEUES=\xff\n")

    assert ".env is not UTF-8 at byte 15" in problem(monkeypatch)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("MAX_JOBS", "0", "greater than or equal to 1"),
        ("MAX_JOBS", "1001", "less than or equal to 1000"),
        ("MAX_JOBS", "many", "a whole number"),
        ("MAX_JOBS", "1.5", "a whole number"),
        ("BEAT_INTERVAL_S", "0", "greater than or equal to 0.1"),
        ("BEAT_INTERVAL_S", "nan", "finite"),
        ("LOST_AFTER_S", "3601", "less than or equal to 3600"),
        ("RELAY_INTERVAL_S", "0", "greater than or equal to 0.05"),
        ("SHUTDOWN_GRACE_S", "-1", "greater than or equal to 0"),
        ("POLL_INTERVAL_S", "11", "less than or equal to 10"),
        ("POLL_INTERVAL_S", "soon", "a number"),
        ("REDIS_TIMEOUT_S", "0", "greater than or equal to 0.1"),
        ("IDEMPOTENCY_RETENTION_DAYS", "0", "greater than or equal to 1"),
        ("PGBOUNCER", "perhaps", "true or false"),
        ("POOL_PROFILE", "huge", "'light', 'medium' or 'heavy'"),
        ("LOG_LEVEL", "loud", "'debug', 'info'"),
        ("LOG_FORMAT", "xml", "'auto', 'json' or 'console'"),
        ("QUEUES", "a,b,a", "'a' stands in it twice"),
        ("QUEUES", ",", "names nothing"),
        ("QUEUES", "two words", "'two words' is not the name of a queue"),
        ("QUEUES", '["a"', "the JSON list is broken"),
        ("MODEL_MODULES", "shop-models", "'shop-models' is not the name of a Python module"),
        ("JOB_MODULES", "shop..jobs", "'shop..jobs' is not the name of a Python module"),
    ],
)
def test_a_malformed_value_is_an_error_that_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    told = problem(monkeypatch, **{f"BULWARK_{name}": value})

    assert told.startswith(f"BULWARK_{name}: ")
    assert complaint in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("DATABASE_URL", f"postgres://ann:{PASSWORD}@db/shop", "its scheme is 'postgres'"),
        ("DATABASE_URL", f"mysql://ann:{PASSWORD}@db/shop", "its scheme is 'mysql'"),
        ("DATABASE_URL", f"postgresql+psycopg://ann:{PASSWORD}@db/shop", "'postgresql+psycopg'"),
        ("DATABASE_URL", f"ann:{PASSWORD}@db/shop", "it is not a URL"),
        ("DATABASE_URL", f"postgresql://ann:{PASSWORD}@db:port/shop", "it is not a URL"),
        ("DATABASE_URL", f"postgresql://ann:{PASSWORD}@db", "it names no database"),
        ("DATABASE_URL", f"{DATABASE_URL}?sslmode=require", "write ssl="),
        ("DATABASE_URL", f"{DATABASE_URL}?ssl_cert_reqs=none", "beside ssl=require"),
        ("DATABASE_URL", f"{DATABASE_URL}?ssl=require&ssl_cert_reqs=some", "ssl_cert_reqs=none"),
        ("DATABASE_URL", f"{DATABASE_URL}?sslrootcert=/ca.pem", "set PGSSLROOTCERT"),
        ("REDIS_URL", f"http://:{PASSWORD}@redis/0", "its scheme is 'http'"),
        ("REDIS_URL", f"redis://:{PASSWORD}@redis:port/0", "it is not a URL"),
        ("REDIS_URL", f"redis://:{PASSWORD}@redis/zero", "its database 'zero' is not a number"),
        ("REDIS_URL", "redis://", "it names no server"),
        ("REDIS_URL", f"redis+sentinel://:{PASSWORD}@/mymaster", "it names no sentinel"),
        ("REDIS_URL", f"redis+sentinel://:{PASSWORD}@a,b:port/mymaster", "it is not a URL"),
        ("REDIS_URL", f"redis+sentinel://:{PASSWORD}@a:1,b", "write it as redis+sentinel://"),
        ("REDIS_URL", f"redis+sentinel://:{PASSWORD}@a/mymaster/zero", "not the name of a master"),
    ],
)
def test_a_malformed_url_is_an_error_that_hides_its_password(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    told = problem(monkeypatch, **{f"BULWARK_{name}": value})

    assert told.startswith(f"BULWARK_{name}: ")
    assert complaint in told
    assert PASSWORD not in told


def test_a_worker_is_not_lost_before_it_could_beat_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    told = problem(monkeypatch, BULWARK_BEAT_INTERVAL_S="10", BULWARK_LOST_AFTER_S="19")

    assert "BULWARK_LOST_AFTER_S is 19" in told
    assert "set it to 20 or more" in told


def test_two_beats_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULWARK_BEAT_INTERVAL_S", "10")
    monkeypatch.setenv("BULWARK_LOST_AFTER_S", "20")

    assert load_settings().lost_after_s == 20


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = problems(monkeypatch, BULWARK_MAX_JOBS="0", BULWARK_PGBOUNCER="?", BULWARK_NO="1")

    named = {one.split(":")[0].split()[0] for one in told}
    assert named == {"BULWARK_MAX_JOBS", "BULWARK_PGBOUNCER", "BULWARK_NO"}


def _limits(field: FieldInfo) -> str:
    """The range of a number as the table writes it."""
    low = next((one.ge for one in field.metadata if hasattr(one, "ge")), None)
    high = next((one.le for one in field.metadata if hasattr(one, "le")), None)
    return "" if low is None else f"{low:g} to {high:g}"


def _default(value: Any) -> str:
    if value in (None, (), {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    text = (
        ",".join(value)
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return f"`{text}`"


def _rows() -> list[tuple[str, str, str, str]]:
    return [
        (f"`{variable(name)}`", _default(field.default), _limits(field), field.description or "")
        for name, field in Settings.model_fields.items()
    ]


def test_the_page_of_settings_says_what_the_settings_are() -> None:
    lines = (ROOT / "docs/settings.md").read_text().splitlines()
    table = [
        tuple(cell.strip() for cell in line.split("|")[1:-1])
        for line in lines
        if line.startswith("| `BULWARK_")
    ]

    assert table == _rows()


def test_the_example_file_has_every_setting_and_every_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = dict(line.removeprefix("# ").split("=", 1) for line in lines if "BULWARK_" in line)

    assert list(given) == [variable(name) for name in Settings.model_fields]
    for name, default, _, _ in _rows():
        if default:
            assert f"`{given[name.strip('`')]}`" == default


def test_the_example_file_is_a_file_that_can_be_used(tmp_path: Path) -> None:
    text = (ROOT / ".env.example").read_text()
    (tmp_path / ".env").write_text(re.sub(r"^# (?=BULWARK_)", "", text, flags=re.MULTILINE))

    assert load_settings().require_servers()


def test_json_dumps_of_a_list_setting_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "b.c"]
    monkeypatch.setenv("BULWARK_QUEUES", json.dumps(names))

    assert list(load_settings().queues) == names
