"""Times of deletion requests: UTC, ISO 8601; receipt and deadline."""

from __future__ import annotations

import dataclasses
import datetime

from engine.errors import UserError

DAYS = 30  # from receipt to the deadline, if neither a deadline nor a number of days is given
_MOST_DAYS = 36_500
# Others are mistyped, and times have to sort as text.
_FIRST_YEAR, _LAST_YEAR = 1970, 9000


def moment(text: str, *, end_of_day: bool = False) -> datetime.datetime:
    """Parse a time in ISO 8601; without an offset it is UTC.

    Args:
        text: The time, or a date alone.
        end_of_day: A date alone is its last second, in place of its first.

    Raises:
        UserError: The text is no time.
    """
    try:
        found = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))  # Python 3.10 does not parse Z
    except ValueError:
        raise UserError(
            f"{text!r} is not a time; expected ISO 8601, such as 2026-05-25 or 2026-05-25T12:00:00Z (UTC)"
        ) from None
    if end_of_day and len(text.strip()) <= len("2026-05-25"):
        found = found.replace(hour=23, minute=59, second=59)
    try:
        found = found.replace(tzinfo=found.tzinfo or datetime.timezone.utc).astimezone(datetime.timezone.utc)
    except OverflowError:
        found = datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)
    if not _FIRST_YEAR <= found.year < _LAST_YEAR:
        raise UserError(f"{text!r}: expected a year from {_FIRST_YEAR} to {_LAST_YEAR - 1}")
    return found


def stamp(time: datetime.datetime) -> str:
    """Return a time as ISO 8601 in whole seconds, UTC, so that times sort as text."""
    return time.astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def utc_now() -> datetime.datetime:
    """Return the current time with the time zone UTC."""
    return datetime.datetime.now(datetime.timezone.utc)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """Receipt and deadline of a request, as they were given.

    Attributes:
        received: Time of receipt, ISO 8601; None: now.
        deadline: ISO 8601; a date alone ends with its last second.
        days: Days from receipt to the deadline, in place of `deadline`; None: 30 (`DAYS`).
        now: The current time; None: of the clock.
    """

    received: str | None = None
    deadline: str | None = None
    days: float | None = None
    now: datetime.datetime | None = None

    def resolve(self) -> tuple[datetime.datetime, datetime.datetime]:
        """Return (receipt, deadline).

        Raises:
            UserError: The times contradict each other, or the receipt is in the future.
        """
        if self.deadline is not None and self.days is not None:
            raise UserError("give --deadline or --days, not both")
        now = self.now or utc_now()
        received = moment(self.received) if self.received else now
        if received > now:
            raise UserError(f"--received {self.received}: lies in the future (UTC)")
        if self.deadline:
            deadline = moment(self.deadline, end_of_day=True)
        else:
            days = DAYS if self.days is None else self.days
            if not abs(days) <= _MOST_DAYS:  # not a number is neither
                raise UserError(f"--days {days:g}: expected a number of days, at most {_MOST_DAYS}")
            deadline = received + datetime.timedelta(days=days)
        if deadline < received:
            raise UserError(
                f"the deadline {deadline:%Y-%m-%d %H:%M} lies before the receipt {received:%Y-%m-%d %H:%M} (UTC)"
            )
        return received, deadline
