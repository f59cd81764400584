"""The other end of the bell: a worker hears what is due in its queues, without polling."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from arq.utils import timestamp_ms
from redis.asyncio import Redis

from jobs._bell import WAKE_EXPIRES_MS, queue_key, wake_key

LEASE_MS = 60_000
"""How long a message of somebody else's is ours alone, while it is made a job."""
UUID_PATTERN = "%-".join("%x" * digits for digits in (8, 4, 4, 4, 12))
OUR_ID = f"^{UUID_PATTERN}:%d+$"
OUR_MESSAGE = '^\1{"t":null,"f":"[^"]*","a":%[%],"k":{},"et":%d+}$'

# KEYS: of each queue the sorted set and the wake-up list. What is due is taken from each queue in
# turn; what another worker has in progress is passed over. A ring of ours is taken out at once,
# with a touch that makes a stock worker's optimistic lock on it fail; a message of somebody else
# stays, leased, until PostgreSQL holds it. A queue that is not empty now wakes the next worker.
CLAIM = """
local now, free, lease_ms, wake_ms = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local our_id, our_message = ARGV[5], ARGV[6]
local message, in_progress, retry = ARGV[7], ARGV[8], ARGV[9]
local PAGE, MOST = 100, 10000

local function reader(queue)
  local page, at, offset, ended = {}, 0, 0, false
  return function()
    while not ended do
      at = at + 1
      if at > #page then
        page = redis.call('ZRANGEBYSCORE', queue, '-inf', now, 'LIMIT', offset, PAGE)
        offset, at = offset + #page, 1
        ended = #page == 0 or offset > MOST
      end
      if not ended and redis.call('EXISTS', in_progress .. page[at]) == 0 then return page[at] end
    end
  end
end

local readers, due = {}, {}
for q = 1, #KEYS / 2 do readers[q] = reader(KEYS[2 * q - 1]) end
local before = -1
while #due < free and #due > before do
  before = #due
  for q = 1, #readers do
    local id = #due < free and readers[q]()
    if id then due[#due + 1] = {q, id} end
  end
end

for q = 1, #readers do
  local wake = KEYS[2 * q]
  if not readers[q]() then
    redis.call('DEL', wake)
  elseif redis.call('EXISTS', wake) == 0 then
    redis.call('LPUSH', wake, '')
    redis.call('PEXPIRE', wake, wake_ms)
  end
end

local heard = {}
for _, one in ipairs(due) do
  local q, id = one[1], one[2]
  local content = redis.call('GET', message .. id)
  local ours = string.find(id, our_id)
    and (not content or string.find(content, our_message))
  redis.call('SET', in_progress .. id, '1', 'PX', lease_ms)
  if ours then
    redis.call('ZREM', KEYS[2 * q - 1], id)
    redis.call('DEL', in_progress .. id, message .. id, retry .. id)
  end
  heard[#heard + 1] = {KEYS[2 * q - 1], id, content, ours and 1 or 0}
end
return heard
"""


@dataclass(frozen=True)
class Message:
    """What was due in a queue: a ring of ours, or what some arq client put there."""

    queue: str
    arq_id: bytes
    content: bytes | None
    is_ring: bool


class Ear:
    """Hears several queues through `waiting`, a client of its own that may block for long.

    That one is never in use twice at a time, so it has one connection, which is replaced as soon
    as it is lost. `redis` may be shared.
    """

    def __init__(
        self, redis: Redis, waiting: Redis, queues: Sequence[str], poll_interval_s: float
    ) -> None:
        self._redis = redis
        self._waiting = waiting
        self._poll_interval_s = poll_interval_s
        self._names = {queue_key(queue).encode(): queue for queue in queues}
        self._turns = deque(queues)
        self._claim = waiting.register_script(CLAIM)

    async def claim(self, most: int) -> list[Message]:
        """Take what is due, at most so much, from the queues in turn, in one call.

        Rings are gone from Redis then: should they not be heard to the end, the relay rings again.
        """
        self._turns.rotate()
        heard = await self._claim(
            keys=[key for queue in self._turns for key in (queue_key(queue), wake_key(queue))],
            args=[
                timestamp_ms(),
                most,
                LEASE_MS,
                WAKE_EXPIRES_MS,
                OUR_ID,
                OUR_MESSAGE,
                job_key_prefix,
                in_progress_key_prefix,
                retry_key_prefix,
            ],
        )
        return [
            Message(self._names[key], arq_id, content, bool(is_ring))
            for key, arq_id, content, is_ring in heard
        ]

    async def wait(self) -> None:
        """Return when a bell wakes us; at the latest when it is time to look for plain arq clients.

        They do not know that somebody waits.
        """
        lists = [wake_key(queue) for queue in self._turns]
        await self._waiting.blpop(lists, self._poll_interval_s)  # type: ignore[arg-type, misc]  # redis-py types it as sync too

    async def remove(self, message: Message) -> None:
        """Take a message that PostgreSQL holds now out of Redis."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zrem(queue_key(message.queue), message.arq_id)
            pipe.delete(
                *(
                    prefix.encode() + message.arq_id
                    for prefix in (job_key_prefix, in_progress_key_prefix, retry_key_prefix)
                )
            )
            await pipe.execute()

    async def close(self) -> None:
        """Let go of the connection through which it hears."""
        await self._waiting.aclose(close_connection_pool=True)
