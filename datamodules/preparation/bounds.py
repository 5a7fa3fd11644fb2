"""Bounds how much a file that is prepared may ask for; each bound is a field of PrepareConfig, which raises it."""

from dataclasses import dataclass

from core.errors import InvalidValue

SLACK = 1 << 26  # bytes that a file may always expand to


@dataclass(frozen=True)
class Bounds:
    """The limits that hold for each file of the input.

    Args:
        record_mb: the largest line of JSON, JSON document or cell of a table, in 10^6 bytes: it is held in memory.
        expansion: how many times its own size a compressed file or a table may become, beyond SLACK.
    """

    record_mb: int = 64
    expansion: int = 200

    @property
    def record_bytes(self) -> int:
        return self.record_mb * 1_000_000

    def check_record(self, num_bytes: int, where: str, what: str) -> None:
        """Raise InvalidValue where a record is too large to be held in memory."""
        if num_bytes > self.record_bytes:
            limit = f"{what} is longer than {self.record_bytes:,} bytes; max_record_mb={2 * self.record_mb} allows more"
            raise InvalidValue("input", where, limit)

    def check_expansion(self, produced: int, consumed: int, where: str) -> None:
        """Raise InvalidValue where so many bytes of a file have become too many bytes of text."""
        if produced > SLACK + self.expansion * consumed:
            became = f"{consumed:,} bytes of it have become over {produced:,}, more than {self.expansion} times as many"
            raise InvalidValue("input", where, f"{became}; max_expansion={10 * self.expansion} allows more")
