"""What is logged while runs are executed: each run's own run.log, and warnings on standard error."""

import contextlib
import logging
from collections.abc import Iterator

from gnbench.plan import Run
from gnbench.record import LOG


class _LogFile(logging.FileHandler):
    """run.log. A line that finds no room on the disk is left out: it is the record's write that stops a run there."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(runs: list[Run]) -> Iterator[None]:
    """Log to each run's file what concerns it or all; warnings, of what was found damaged, to standard error too."""
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("gnbench: %(message)s"))
    console.addFilter(lambda record: record.levelno == logging.WARNING)
    handlers = [console]
    for run in runs:
        file = _LogFile(run.directory / LOG, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        file.addFilter(lambda record, name=run.name: getattr(record, "run", name) == name)
        handlers.append(file)
    logger = logging.getLogger("gnbench")
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
