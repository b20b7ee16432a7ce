"""What Snakemake shows while it runs a grid: one line when a cell starts, ends or fails.

The folder's name is what Snakemake recognises a logger plugin by; the plugin's name is `book`.
Snakemake's complete messages are in `.snakemake/log`.
"""

import logging
import sys
import time
from typing import Any

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

# What Snakemake says again about a job that failed, after the line that tells which one.
ECHOES = (
    "CalledProcessError in file",
    "Exiting because a job execution failed",
    "At least one job did not complete successfully",
)


def duration(seconds: float) -> str:
    """Return a duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LogHandler(LogHandlerBase):
    """Prints the progress over cells, and every warning and error that is not a cell's."""

    writes_to_stream = True  # in the place of Snakemake's own
    writes_to_file = False  # Snakemake's log file is written all the same
    has_filter = True  # `emit` decides what is shown
    has_formatter = False  # warnings and errors are worded by Snakemake
    needs_rulegraph = False

    def __post_init__(self) -> None:
        """Start the clock."""
        self._begin = time.monotonic()
        self._started: dict[int, tuple[str, bool, float]] = {}
        self._cells = 0
        self._ended = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line for one event, if it has one."""
        fields = record.__dict__
        event = fields.get("event")
        if event == LogEvent.RUN_INFO:
            self._cells = fields["stats"].get("execute", 0)
            self._say(f"{self._cells} {'cell' if self._cells == 1 else 'cells'} to run")
        elif event == LogEvent.JOB_INFO:
            self._start(fields)
        elif event == LogEvent.JOB_FINISHED:
            self._end(fields["job_id"], "finished")
        elif event == LogEvent.JOB_ERROR:
            self._end(fields["jobid"], "FAILED")
        elif record.levelno >= logging.WARNING:
            text = self.format(record)
            if not any(echo in text for echo in ECHOES):
                self._say(text)

    def _start(self, fields: dict[str, Any]) -> None:
        is_cell = fields["rule_name"] == "execute"
        if is_cell or fields["rule_name"] == "render":
            name = fields["wildcards"]["cell"] if is_cell else "rendering"
            self._started[fields["jobid"]] = (name, is_cell, time.monotonic())
            self._line("started", name)

    def _end(self, job: int, how: str) -> None:
        if job not in self._started:
            return
        name, is_cell, begin = self._started.pop(job)
        self._ended += is_cell
        count = f", {self._ended} of {self._cells}" if is_cell else ""
        self._line(how, f"{name} ({duration(time.monotonic() - begin)}{count})")

    def _line(self, what: str, text: str) -> None:
        self._say(f"{duration(time.monotonic() - self._begin):>7}  {what:<8}  {text}")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
