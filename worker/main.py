"""Where a worker is put together: `bulwark worker`, or `arq worker.main.WorkerSettings`."""

import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import structlog
from arq.connections import ArqRedis
from arq.typing import WorkerCoroutine
from arq.worker import Function, RetryJob, Worker, create_worker, func
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from db import migrations
from db.engine import PoolProfile, create_engine, make_sessions
from db.errors import NotAtHead
from db.ledger import worker
from db.registry import discover_models
from db.retry import DATABASE_ERRORS, describe
from db.transaction import transaction
from jobs._bell import EXPIRES_MS, deserialize, job_id_of, queue_key, serialize
from jobs._declaration import discover_jobs
from worker.execution import Executor
from worker.liveness import Liveness
from worker.logs import configure_logs
from worker.redis_pool import make_redis, require_lasting
from worker.relay import Relay
from worker.rescue import Rescue
from worker.settings import Settings, load_settings
from worker.shutdown import TIDY_TIMEOUT_S, Shutdown, cancel_until_done

ARQ_JOB_TIMEOUT_S = 8 * 24 * 3600
"""Longer than any job may run: the time limit is kept in `execution` and `liveness`."""
REDIS_WAIT_S = 1.0
MAX_DELIVERIES = 1_000_000
"""arq's own retries are not used; every ring is a job of its own to it."""

log = structlog.get_logger("bulwark.worker")


def __getattr__(name: str) -> Any:
    """Make `WorkerSettings` when arq asks for it, so that importing this module reads nothing."""
    if name == "WorkerSettings":
        return worker_settings(load_settings())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; jobs that do not end within the grace are given back.

    When Redis goes away its jobs are given back, and it begins anew once Redis answers again.
    Raises SettingsError, NotAtHead, and the errors of a server that cannot be reached at the start.
    """
    while True:
        process = Process(settings)
        arq_worker = create_worker(worker_settings(settings, process))
        try:
            arq_worker.run()
        except RedisError as error:
            if not process.started:
                raise
            log.warning("worker.redis_lost", worker=str(process.worker_id), reason=str(error))
            arq_worker.loop.run_until_complete(process.stop())
        if process.told_to_stop:
            return
        arq_worker.loop.run_until_complete(_until_redis_answers(settings))


async def _until_redis_answers(settings: Settings) -> None:
    redis = make_redis(settings.require_servers().redis_url, settings.redis_timeout_s)
    async with redis:
        while True:
            try:
                await redis.ping()
            except RedisError:
                await asyncio.sleep(REDIS_WAIT_S)
            else:
                return


def worker_settings(settings: Settings, process: "Process | None" = None) -> Any:
    """The class that arq reads. Opens nothing; everything starts in `on_startup`."""
    servers = settings.require_servers()
    configure_logs(settings.log_level, settings.log_format)
    process = process or Process(settings)
    first, *others = settings.queues
    return type(
        "WorkerSettings",
        (),
        {
            **_arq_options(settings, servers.redis_url, first, process.functions(first)),
            "on_startup": lambda ctx: process.start(ctx["redis"], others),
            "on_shutdown": lambda _: process.stop(),
            "handle_signals": False,
        },
    )


def _arq_options(
    settings: Settings, redis_url: str, queue: str, functions: Sequence[Function]
) -> dict[str, Any]:
    return {
        "functions": functions,
        "queue_name": queue_key(queue),
        "redis_pool": make_redis(redis_url, settings.redis_timeout_s),
        "max_jobs": settings.max_jobs,
        "job_timeout": ARQ_JOB_TIMEOUT_S,
        "keep_result": 0,
        "poll_delay": settings.poll_interval_s,
        "max_tries": MAX_DELIVERIES,
        "health_check_interval": 3600,
        "health_check_key": f"bulwark:arq-health:{queue}",  # arq's own could be a queue's name
        "expires_extra_ms": EXPIRES_MS,
        "job_serializer": serialize,
        "job_deserializer": deserialize,
        "log_results": False,
    }


@dataclass
class Process:
    """One worker process from its start to its end, with a worker row of its own."""

    settings: Settings
    worker_id: UUID = field(default_factory=uuid4)
    _engine: AsyncEngine | None = None
    _liveness: Liveness | None = None
    _executor: Executor | None = None
    _shutdown: Shutdown | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _others: list[Worker] = field(default_factory=list)

    @property
    def started(self) -> bool:
        """Whether it got as far as to take jobs."""
        return self._executor is not None

    @property
    def told_to_stop(self) -> bool:
        """Whether a signal, or a part that failed, has brought it to its end."""
        return self._shutdown is not None and self._shutdown.begun

    def functions(self, queue: str) -> list[Function]:
        """Every job under its own name; what is delivered is only its id.

        A ring that is taken up leaves the queue at once: arq would keep it there while the job
        runs, in the way of others, since each worker reads only the first part of its queue.
        Should the worker die before it has claimed the job, the relay rings again.
        """

        async def deliver(ctx: dict[Any, Any]) -> None:
            assert self._executor is not None
            assert self._shutdown is not None
            if self._shutdown.begun:
                await self._shutdown.hold()
                raise RetryJob("this worker takes no more jobs; leave it to another")
            with suppress(RedisError):
                await ctx["redis"].zrem(queue_key(queue), ctx["job_id"])
            await self._executor.deliver(job_id_of(ctx["job_id"]))

        coroutine: WorkerCoroutine = deliver
        return [func(coroutine, name=kind) for kind in discover_jobs(self.settings.job_modules)]

    def make_engine(self, profile: PoolProfile) -> AsyncEngine:
        return create_engine(
            self.settings.require_servers().database_url,
            profile=profile,
            application_name=worker.APPLICATION_NAME.format(worker_id=self.worker_id),
            pgbouncer=self.settings.pgbouncer,
        )

    async def start(self, redis: ArqRedis, other_queues: Sequence[str]) -> None:
        """Check the servers, make the worker's row, and start what runs beside the jobs."""
        main = asyncio.current_task()
        assert main is not None
        self._shutdown = Shutdown(main, self.settings.shutdown_grace_s)
        self._shutdown.listen()
        await require_lasting(redis)
        self._engine = self.make_engine(self.settings.pool_profile)
        await require_head(self._engine)
        sessions = make_sessions(self._engine)
        await self._register(sessions)
        self._liveness = Liveness(
            self.worker_id,
            lambda: self.make_engine(PoolProfile.LIGHT),
            self.settings.beat_interval_s,
        )
        self._liveness.start()
        self._executor = Executor(
            self.worker_id,
            sessions,
            discover_jobs(self.settings.job_modules),
            discover_models(self.settings.model_modules),
            self.settings.import_folders,
            self._liveness,
        )
        self._shutdown.spare(self._executor)
        self._look_after(sessions, redis)
        self._serve(other_queues)
        for task in self._tasks:
            self._shutdown.watch(task)
        log.info("worker.started", worker=str(self.worker_id), queues=self.settings.queues)

    async def _register(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        await transaction(
            sessions,
            lambda session: worker.register(
                session, self.worker_id, socket.gethostname(), os.getpid(), self.settings.queues
            ),
            name="worker.register",
            receipted=True,
        )

    def _look_after(self, sessions: async_sessionmaker[AsyncSession], redis: ArqRedis) -> None:
        settings = self.settings
        relay = Relay(self.worker_id, sessions, redis, settings.queues, settings.relay_interval_s)
        rescue = Rescue(self.worker_id, sessions, settings.lost_after_s)
        self._tasks = [
            asyncio.create_task(relay.run_forever(), name="relay"),
            asyncio.create_task(rescue.run_forever(), name="rescue"),
        ]

    def _serve(self, queues: Sequence[str]) -> None:
        """arq reads one queue per worker: each further queue gets a worker in this process."""
        url = self.settings.require_servers().redis_url
        for queue in queues:
            options = _arq_options(self.settings, url, queue, self.functions(queue))
            other = Worker(**options, handle_signals=False)
            self._others.append(other)
            self._tasks.append(asyncio.create_task(other.async_run(), name=f"queue {queue}"))

    async def stop(self) -> None:
        """End what was started, in the opposite order; jobs that still run are given back.

        Raises the error of a part that failed and so brought the process to its end.
        """
        for other in self._others:
            other.allow_pick_jobs = False
            if other.tasks:
                await asyncio.wait(other.tasks.values(), timeout=TIDY_TIMEOUT_S)
            await other.close()
        await asyncio.gather(*map(cancel_until_done, self._tasks))
        if self._executor is not None:
            self._executor.stop()
            await asyncio.wait([asyncio.create_task(self._executor.idle())], timeout=TIDY_TIMEOUT_S)
            await self._executor.settle()
        if self._liveness is not None:
            await asyncio.to_thread(self._liveness.stop)
            await self._deregister()
        if self._engine is not None:
            await self._engine.dispose()
        log.info("worker.stopped", worker=str(self.worker_id))
        if self._shutdown is not None:
            self._shutdown.ignore_signals()
            if self._shutdown.failure is not None:
                raise self._shutdown.failure

    async def _deregister(self) -> None:
        assert self._engine is not None
        try:
            await transaction(
                make_sessions(self._engine),
                lambda session: worker.deregister(session, self.worker_id),
                name="worker.deregister",
                receipted=True,
            )
        except DATABASE_ERRORS as error:
            log.warning("worker.not_deregistered", reason=describe(error))


async def require_head(engine: AsyncEngine) -> None:
    """Raise NotAtHead unless the database is at the newest migration."""
    async with engine.connect() as connection:
        current, head = await connection.run_sync(migrations.current_and_head)
    if current != head:
        raise NotAtHead(
            f"the database is at migration {current or 'none'}, the program at {head}; "
            "run `bulwark migrate`"
        )
