"""Where a worker is put together: `bulwark worker`, or `arq worker.main.WorkerSettings`."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import structlog
from arq.connections import ArqRedis
from pydantic import SecretStr
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger import worker
from db.ledger.job import Ring
from db.registry import discover_models
from db.retry import DATABASE_ERRORS, describe
from jobs._bell import Bell, arq_id
from jobs._discovery import Jobs, discover_jobs
from jobs._producer import Producer
from worker.arq_worker import ArqWorker, functions_named
from worker.cancelling import Canceller
from worker.delivery import Delivery
from worker.ear import Ear
from worker.executor import Executor
from worker.gleaner import Gleaner
from worker.interpreter import tune_interpreter
from worker.listening import Listener
from worker.liveness import Liveness
from worker.logs import configure_logs
from worker.message import Message
from worker.redis_pool import Doorkeeper, close_redis, make_redis, require_lasting
from worker.registration import deregister, register, require_head
from worker.relay import Relay
from worker.rescue import Rescue
from worker.schedule import Scheduler, plan_schedules
from worker.settings import Settings, load_settings
from worker.shutdown import Lines, Shutdown, cancel_until_done, ended_beside

REDIS_AT_START_S = 10.0
"""How long an answer from Redis may take at the start, when a machine often has most to do."""
SIGN_OFF_WITHIN_S = 5.0
"""How long PostgreSQL may take to answer an ending worker, from when its jobs are given back."""
log = structlog.get_logger("bulwark.worker")


def __getattr__(name: str) -> Any:
    """Make `WorkerSettings` when arq asks for it, so that importing this module reads nothing."""
    if name == "WorkerSettings":
        return worker_settings(load_settings())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; jobs that do not end within the grace are given back.

    Raises SettingsError, NotAtHead, and the errors of a server that cannot be reached at the start.
    """
    asyncio.run(serve(settings))


async def serve(settings: Settings) -> None:
    """Be a worker in the running event loop, from start to end; see `run_worker`."""
    settings.require_servers()
    configure_logs(settings.log_level, settings.log_format)
    process = Process(settings, discover_jobs(settings.job_modules))
    try:
        await process.arq_worker.async_run()
    except asyncio.CancelledError:
        if not process.told_to_stop:
            raise
    finally:
        process.give_back()
        await process.close()


def worker_settings(settings: Settings) -> Any:
    """The class that arq's command line reads; opens nothing.

    That command line builds arq's own worker, which, before it takes any job, hands over to ours
    and ends when ours has ended.
    """
    settings.require_servers()

    async def hand_over(_: dict[Any, Any]) -> None:
        await serve(settings)
        raise asyncio.CancelledError("the worker has ended in order")

    return type(
        "WorkerSettings",
        (),
        {
            "functions": functions_named(discover_jobs(settings.job_modules)),
            "redis_pool": Doorkeeper(redis_at_start(settings).connection_pool),
            "on_startup": hand_over,
            "handle_signals": False,
        },
    )


def redis_at_start(settings: Settings) -> ArqRedis:
    """A client with more patience than others have."""
    timeout_s = max(settings.redis_timeout_s, REDIS_AT_START_S)
    return make_redis(settings.require_servers().redis_url, timeout_s)


@dataclass
class Process:
    """One worker process from its start to its end, with a worker row of its own."""

    settings: Settings
    jobs: Jobs
    worker_id: UUID = field(default_factory=uuid4)
    _engine: AsyncEngine | None = None
    _lines: Lines | None = None
    _liveness: Liveness | None = None
    _executor: Executor | None = None
    _delivery: Delivery | None = None
    _relay: Relay | None = None
    _shutdown: Shutdown | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _sign_off_by_s: float = 0.0
    _may_have_row: bool = False

    def __post_init__(self) -> None:
        """Make what talks to Redis; nothing is opened yet."""
        settings = self.settings
        self._plans = plan_schedules(self.jobs, settings)
        url = settings.require_servers().redis_url
        self._redis = make_redis(url, settings.redis_timeout_s)
        waiting = make_redis(url, settings.redis_timeout_s + settings.poll_interval_s)
        self._redis_at_start = redis_at_start(settings)
        self._ear = Ear(self._redis, waiting, settings.queues, settings.poll_interval_s)
        self.arq_worker = ArqWorker(
            self._ear,
            self._carry_out,
            self.jobs,
            self._is_known,
            redis_pool=self._redis_at_start,
            bulk_slots=(
                max(1, settings.max_jobs * 4 // 5)
                if settings.bulk_slots is None
                else settings.bulk_slots
            ),
            max_jobs=settings.max_jobs,
            on_startup=lambda _: self.start(),
            on_shutdown=lambda _: self.stop(),
        )

    def _is_known(self) -> bool:
        """Whether PostgreSQL would take a claim; if not, rings are better left to other workers."""
        return self._liveness is None or self._liveness.is_known

    @property
    def told_to_stop(self) -> bool:
        """Whether a signal, or a part that failed, has brought it to its end."""
        return self._shutdown is not None and self._shutdown.begun

    async def _carry_out(self, message: Message) -> None:
        assert self._delivery is not None
        await self._delivery.carry_out(message)

    def make_engine(self, profile: PoolProfile) -> AsyncEngine:
        return create_engine(
            self.settings.require_servers().database_url,
            profile=profile,
            application_name=worker.APPLICATION_NAME.format(worker_id=self.worker_id),
            pgbouncer=self.settings.pgbouncer,
        )

    def _make_listener(self, url: SecretStr, relay: Relay) -> Listener:
        name = worker.APPLICATION_NAME.format(worker_id=self.worker_id)
        engine = create_engine(
            url.get_secret_value(), profile=PoolProfile.LIGHT, application_name=name
        )
        return Listener(engine, relay.wake)

    async def start(self) -> None:
        """Check the servers, make the worker's row, and start what runs beside the jobs."""
        tune_interpreter()
        self._listen()
        await require_lasting(self._redis_at_start)
        await close_redis(self._redis_at_start)
        self._engine = self.make_engine(self.settings.pool_profile)
        self._lines = Lines(self._engine)
        await require_head(self._engine)
        sessions = make_sessions(self._engine)
        self._may_have_row = True  # told to stop meanwhile, it may be there
        await register(sessions, self.worker_id, self.settings.queues, self.jobs)
        self._liveness = Liveness(
            self.worker_id,
            lambda: self.make_engine(PoolProfile.LIGHT),
            self.settings.beat_interval_s,
        )
        self._liveness.start()
        self._executor = Executor(
            self.worker_id,
            sessions,
            self.jobs,
            discover_models(self.settings.model_modules),
            self.settings.import_folders,
            self._liveness,
            self.settings.housekeeping,
            silence=self._silence,
        )
        self._delivery = Delivery(self._executor, self._ear)
        self._look_after(sessions, self._executor)
        log.info("worker.started", worker=str(self.worker_id), queues=self.settings.queues)

    async def _silence(self, rings: Sequence[Ring]) -> None:
        """Take rings out of Redis whose jobs are claimed; what stays there does no harm."""
        with suppress(RedisError, OSError):
            for queue in {one.queue for one in rings}:
                names = [arq_id(one.job_id, one.number) for one in rings if one.queue == queue]
                await Bell(self._redis).silence(queue, names)

    def _listen(self) -> None:
        main = self.arq_worker.main_task
        assert main is not None
        self._shutdown = Shutdown(main, self.settings.shutdown_grace_s, self._take_no_more)
        self._shutdown.listen()

    def _take_no_more(self) -> None:
        self.arq_worker.allow_pick_jobs = False

    def _look_after(self, sessions: async_sessionmaker[AsyncSession], executor: Executor) -> None:
        settings = self.settings
        self._relay = Relay(
            sessions,
            self._redis,
            settings.queues,
            settings.relay_interval_s,
            executor.unclaimed,
        )
        gleaner = Gleaner(sessions, self._redis, self._ear, settings.queues, self.jobs)
        rescue = Rescue(
            self.worker_id, sessions, settings.lost_after_s, on_loss=gleaner.go_through_all
        )
        producer = Producer(sessions, self.jobs, Bell(self._redis), heeds_depth=False)
        scheduler = Scheduler(self.worker_id, sessions, producer, self._plans)
        self._tasks = [
            asyncio.create_task(self._relay.run_forever(), name="relay"),
            asyncio.create_task(rescue.run_forever(), name="rescue"),
            asyncio.create_task(scheduler.run_forever(), name="schedule"),
            asyncio.create_task(gleaner.run_forever(), name="glean"),
            asyncio.create_task(Canceller(sessions, executor.running).run_forever(), name="cancel"),
        ]
        if settings.listen_url is not None:
            listener = self._make_listener(settings.listen_url, self._relay)
            self._tasks.append(asyncio.create_task(listener.run_forever(), name="listen"))
        assert self._shutdown is not None
        self._shutdown.spare(executor)
        for task in self._tasks:
            self._shutdown.watch(task)

    def give_back(self) -> None:
        """Let no job run any longer; those that do are given back. From here on it is urgent."""
        loop = asyncio.get_running_loop()
        self._sign_off_by_s = loop.time() + SIGN_OFF_WITHIN_S
        if self._lines is not None:
            loop.call_at(self._sign_off_by_s, self._lines.cut)
        if self._executor is not None:
            self._executor.stop()
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """End what was started, in the opposite order.

        Raises the error of a part that failed and so brought the process to its end.
        """
        await asyncio.gather(*map(cancel_until_done, self._tasks))
        if self._executor is not None:
            await self._executor.settle()
        if self._relay is not None:
            await self._relay.hand_over(self._sign_off_by_s)
        if self._may_have_row:
            await self._sign_off()
        if self._engine is not None:
            await self._engine.dispose()
        log.info("worker.stopped", worker=str(self.worker_id))
        if self._shutdown is not None:
            self._shutdown.ignore_signals()
            if self._shutdown.failure is not None:
                raise self._shutdown.failure

    async def close(self) -> None:
        """Stop, if that was not done yet, and let go of Redis."""
        try:
            await self.arq_worker.close()
        finally:
            await close_redis(self._redis)

    async def _sign_off(self) -> None:
        """Beat no more and say so; a PostgreSQL that does not answer is not waited for."""
        if self._liveness is not None:
            self._liveness.retire()
        try:
            async with asyncio.timeout_at(self._sign_off_by_s):
                if self._liveness is not None:
                    await ended_beside(self._liveness.stop)
                assert self._engine is not None
                await deregister(make_sessions(self._engine), self.worker_id)
        except (TimeoutError, *DATABASE_ERRORS) as error:
            log.warning("worker.not_deregistered", reason=describe(error))
