"""Log lines as JSON on standard error, which init connects to the process's file in the home."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import structlog


class Logger:
    """One process's logger.

    structlog is imported with the first line: it costs a process a fifth of its start, and a
    service that starts again after a death has streams waiting for it.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._logger: structlog.typing.FilteringBoundLogger | None = None

    def info(self, event: str, **fields: object) -> None:
        """Something that is as it should be."""
        self._bound().info(event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        """Something that somebody may want to look at."""
        self._bound().warning(event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """Something that somebody should look at."""
        self._bound().error(event, **fields)

    def critical(self, event: str, *, exc_info: bool = False, **fields: object) -> None:
        """What this process ends of."""
        self._bound().critical(event, exc_info=exc_info, **fields)

    def log(self, level: int, event: str, **fields: object) -> None:
        """At a level of the `logging` module."""
        self._bound().log(level, event, **fields)

    def _bound(self) -> "structlog.typing.FilteringBoundLogger":
        if self._logger is None:
            self._logger = _configured(self._process)
        return self._logger


def _configured(process: str) -> "structlog.typing.FilteringBoundLogger":
    import structlog  # see Logger

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(process=process)
    return logger


def configure(process: str) -> Logger:
    """The logger of this process; every line names it."""
    return Logger(process)
