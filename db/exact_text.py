"""Values as text from which PostgreSQL reads exactly the same values again."""

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

_FORMS = {
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
}
_USE_FORMS = sa.text(
    "SELECT " + ", ".join(f"set_config('{name}', '{form}', true)" for name, form in _FORMS.items())
)


async def use_exact_text(session: AsyncSession) -> None:
    """Let PostgreSQL write and read values in forms that lose nothing, until the transaction ends.

    The same that pg_dump chooses, and instants in UTC.
    """
    await session.execute(_USE_FORMS)
