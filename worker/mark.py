"""The mark of a run of Redis, by which relays know whether it still is what it was."""

from uuid import uuid4

from redis.asyncio import Redis

from worker.redis_pool import run_id_of

MARK_KEY = "bulwark:relay:mark:{run_id}"
MARK_KEPT_S = 30 * 24 * 3600
"""How long the mark of a run of Redis stays; then all is rung again, which does no harm."""
MARK_LEASE_S = 60
"""How long the relay that sets the mark has for a page or a batch; then another may do it all."""


class Mark:
    """One relay's hold on the mark that all share: it keeps only the one that it has set."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._key = ""
        self._mine = uuid4().bytes

    async def set_if_missing(self) -> bool:
        """Set the mark of the present run for MARK_LEASE_S; false where there is one."""
        self._key = await mark_key(self._redis)
        if await self._redis.exists(self._key):
            return False
        return bool(await self._redis.set(self._key, self._mine, ex=MARK_LEASE_S, nx=True))

    async def keep_lease(self) -> None:
        """Have the others leave the rest to this relay."""
        await self._keep(MARK_LEASE_S)

    async def keep(self) -> None:
        """Tell all relays that Redis is what it was."""
        await self._keep(MARK_KEPT_S)

    async def _keep(self, seconds: int) -> None:
        """One that is gone, or was set by another since, tells that all is owed anew."""
        if await self._redis.get(self._key) == self._mine:
            await self._redis.expire(self._key, seconds)


async def mark_key(redis: Redis) -> str:
    """Of the run of Redis: one that was restarted may have read an old copy, mark and all."""
    return MARK_KEY.format(run_id=await run_id_of(redis))
