"""The other end of the bell: a worker hears what is due in its queues, without polling."""

from collections import deque
from collections.abc import Mapping, Sequence

import structlog
from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from redis.asyncio import Redis

from db.ledger.job import PRIORITY_LIMIT, Ring
from jobs._bell import (
    PRIORITY_STEP_MS,
    WAKE_EXPIRES_MS,
    queue_key,
    wake_key,
)
from worker.message import Message, Owner
from worker.overheard import Overheard
from worker.redis_pool import close_redis

LEASE_MS = 60_000
"""How long a message of somebody else's is ours alone, while it is made a job."""
UUID_PATTERN = "%-".join("%x" * digits for digits in (8, 4, 4, 4, 12))
OUR_ID = f"^{UUID_PATTERN}:%d+$"
OUR_MESSAGE = '^\1{"t":null,"f":"[^"]*","a":%[%],"k":{},"et":(%d+)}$'
LEAST_OF_NORMAL_MS = PRIORITY_LIMIT * PRIORITY_STEP_MS + PRIORITY_STEP_MS // 2
"""Half a step less than a ring of priority 0 lies before its time: clocks of two may differ."""
LEAST_OF_RINGS_MS = PRIORITY_STEP_MS // 2
"""So for the ring that comes last; what lies later is a plain client's, whose score is its time."""
MOST_STEPS = 2 * PRIORITY_LIMIT + 1
log = structlog.get_logger("bulwark.ear")

# What a key holds; of a type that no message has it is given as Redis would dump it.
CONTENT = """
local function content_of(key)
  local content = redis.pcall('GET', key)
  if type(content) == 'table' then content = redis.call('DUMP', key) end
  return content
end
"""

# KEYS: of each queue the sorted set and the wake-up list. What is due, by the clock of Redis since
# those of workers may differ, is taken from each queue in turn; what another worker has in progress
# is passed over. A ring of ours is taken out at once, with a touch that makes a stock worker's
# optimistic lock on it fail; a message of somebody else stays, leased, until PostgreSQL holds it. A
# ring is known by its score, which lies whole steps of priority before its time: a plain client can
# make its id and its message, but not all three. Rings of low priority that may not be taken hold
# up no message of a plain client, which lies behind them. A queue that is not empty now wakes the
# next worker; one that cannot be read stops no other.
CLAIM = (
    CONTENT
    + """
local free, lease_ms, wake_ms = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local our_id, our_message, step_ms, most_steps = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
local message, in_progress, retry = ARGV[8], ARGV[9], ARGV[10]
local free_for_low, least_of_normal = tonumber(ARGV[11]), tonumber(ARGV[12])
local least_of_rings = tonumber(ARGV[13])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local PAGE, MOST = 100, 10000
local NOT_OURS, LIKE_OURS, OURS = 0, 1, 2
local unreadable = {}

local function is_low(score)
  return now - score < least_of_normal and now - score >= least_of_rings
end

local function reader(queue, from, to)
  local page, at, offset, ended = {}, -1, 0, false
  return function(low_too)
    while not ended do
      at = at + 2
      if at > #page then
        page = redis.pcall(
          'ZRANGEBYSCORE', queue, from, to, 'WITHSCORES', 'LIMIT', offset, PAGE)
        if page.err then unreadable[#unreadable + 1] = {queue, page.err} end
        offset, at = offset + PAGE, 1
        ended = #page == 0 or offset > MOST
      end
      if not ended and not low_too and is_low(page[at + 1]) then
        at = at - 2
        return nil
      end
      if not ended and redis.call('EXISTS', in_progress .. page[at]) == 0 then
        return page[at], page[at + 1]
      end
    end
  end
end

local function whose(id, content, score)
  if not string.find(id, our_id) then return NOT_OURS end
  if not content then return now - score >= tonumber(step_ms) and OURS or NOT_OURS end
  local rung_ms = string.match(content, our_message)
  if not rung_ms then return NOT_OURS end
  local steps = (rung_ms - score) / step_ms
  return steps % 1 == 0 and steps >= 1 and steps <= most_steps and OURS or LIKE_OURS
end

local function first_due(queue)
  local last_ring = string.format('%.0f', now - least_of_rings)
  local ring = reader(queue, '-inf', last_ring)
  local foreign = reader(queue, '(' .. last_ring, now)
  return function(low_too)
    local id, score = ring(low_too)
    if id then return id, score end
    return foreign(true)
  end
end

local readers, due = {}, {}
for q = 1, #KEYS / 2 do readers[q] = first_due(KEYS[2 * q - 1]) end
local before, low = -1, 0
while #due < free and #due > before do
  before = #due
  for q = 1, #readers do
    if #due < free then
      local id, score = readers[q](low < free_for_low)
      if id then
        due[#due + 1] = {q, id, score}
        if is_low(score) then low = low + 1 end
      end
    end
  end
end

for q = 1, #readers do
  local wake = KEYS[2 * q]
  if not readers[q](true) then
    redis.call('DEL', wake)
  elseif redis.call('TYPE', wake).ok ~= 'list' then
    redis.call('DEL', wake)
    redis.call('LPUSH', wake, '')
    redis.call('PEXPIRE', wake, wake_ms)
  end
end

local heard = {}
for _, one in ipairs(due) do
  local q, id, score = one[1], one[2], one[3]
  local content = content_of(message .. id)
  local owner = whose(id, content, score)
  redis.call('SET', in_progress .. id, '1', 'PX', lease_ms)
  if owner == OURS then
    redis.call('ZREM', KEYS[2 * q - 1], id)
    redis.call('DEL', in_progress .. id, message .. id, retry .. id)
  end
  heard[#heard + 1] = {KEYS[2 * q - 1], id, content, owner, is_low(score) and 1 or 0}
end
return {heard, unreadable}
"""
)

# KEYS: the sorted set, then the keys of one message. A client may have used the id again meanwhile.
REMOVE = (
    CONTENT
    + """
if (content_of(KEYS[2]) or nil) == ARGV[2] then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
end
"""
)


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
        self._remove = redis.register_script(REMOVE)
        self._unreadable: set[str] = set()
        self._overheard = Overheard()

    async def claim(self, most: int, most_low: int | None = None) -> list[Message]:
        """Take what is due, at most so much, and so much of low priority, from the queues in turn.

        Rings are gone from Redis then: should they not be heard to the end, the relay rings again.
        """
        most_low = most if most_low is None else most_low
        own = self._overheard.pick(most, most_low)
        low = sum(one.is_low for one in own)
        due = await self._claim_due(most - len(own), most_low - low) if len(own) < most else []
        self._overheard.take(own)
        return [*own, *due]

    async def overhear(self, rings: Sequence[Ring]) -> None:
        """Let these be heard here, before what is due in Redis; return when all are."""
        await self._overheard.add(rings)

    async def _claim_due(self, most: int, most_low: int) -> list[Message]:
        self._turns.rotate()
        heard, unreadable = await self._claim(
            keys=[key for queue in self._turns for key in (queue_key(queue), wake_key(queue))],
            args=[
                most,
                LEASE_MS,
                WAKE_EXPIRES_MS,
                OUR_ID,
                OUR_MESSAGE,
                PRIORITY_STEP_MS,
                MOST_STEPS,
                job_key_prefix,
                in_progress_key_prefix,
                retry_key_prefix,
                most_low,
                LEAST_OF_NORMAL_MS,
                LEAST_OF_RINGS_MS,
            ],
        )
        self._tell({self._names[key]: reason.decode() for key, reason in unreadable})
        return [
            Message(self._names[key], arq_id, content, Owner(owner), is_low=bool(is_low))
            for key, arq_id, content, owner, is_low in heard
        ]

    def _tell(self, unreadable: Mapping[str, str]) -> None:
        """Say once which queues cannot be read, and once that they can again."""
        for queue in unreadable.keys() - self._unreadable:
            log.warning(
                "queue.unreadable",
                queue=queue,
                reason=unreadable[queue],
                remedy=f"look at the key {queue_key(queue)} in Redis; other queues go on",
            )
        for queue in self._unreadable - unreadable.keys():
            log.info("queue.readable", queue=queue)
        self._unreadable = set(unreadable)

    async def wait(self) -> None:
        """Return when a bell wakes us; at the latest when it is time to look for plain arq clients.

        They do not know that somebody waits.
        """
        lists = [wake_key(queue) for queue in self._turns]
        await self._waiting.blpop(lists, self._poll_interval_s)  # type: ignore[arg-type, misc]  # redis-py types it as sync too

    async def remove(self, message: Message) -> None:
        """Take a message that PostgreSQL holds now out of Redis, unless its id has another now."""
        keys = [
            prefix.encode() + message.arq_id
            for prefix in (job_key_prefix, in_progress_key_prefix, retry_key_prefix)
        ]
        known = [] if message.content is None else [message.content]
        await self._remove(keys=[queue_key(message.queue), *keys], args=[message.arq_id, *known])

    async def close(self) -> None:
        """Let go of the connection through which it hears."""
        await close_redis(self._waiting)
