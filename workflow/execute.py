"""Run one cell of a grid: `execute.py NOTEBOOK --parameters JSON --out DIR --log FILE --copy FILE`.

papermill writes to the log, cell by cell, so that a failed notebook stays readable there. Only a
copy that ran to its end without an error is published, in one step.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

from attempts import attempt
from cells import KERNEL_DIED, last_error, problems, stop_with_parent, use_cache, with_device
from machine import held_gpus
from nbclient.exceptions import DeadKernelError
from papermill import PapermillExecutionError

from pai_utils.support import kernels

# Batches of one size come and go. Memory that glibc keeps need not be cleared again, and large
# pages are faster: together a tenth of a forward's time, and more of a backward's.
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "THP_MEM_ALLOC_ENABLE": "1",
}


def execute(notebook: Path, parameters: dict[str, object], out: Path, log: Path) -> list[str]:
    """Execute a notebook into `log` and return the problems of the executed copy."""
    out.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    # What went wrong is in the copy, where a reader looks for it.
    with contextlib.suppress(PapermillExecutionError, DeadKernelError):
        kernels.execute(notebook, log, {**parameters, "out": out.as_posix()})
    return problems(log)


def main() -> int:
    """Execute the cell that the command line names; 0 if its copy was published."""
    parser = argparse.ArgumentParser(description="Execute one cell of a grid.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--parameters", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--copy", type=Path, required=True)
    parser.add_argument("--attempts", type=Path, required=True)
    parser.add_argument("--device", help="in the place of `auto`")
    parser.add_argument("--gpus", type=Path, help="folder by which processes share the GPUs")
    arguments = parser.parse_args()

    stop_with_parent()
    use_cache()
    os.environ |= MEMORY | os.environ
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what clusters end jobs with
    # Where a kernel died, callbacks for its messages may fail too; its end is reported anyway.
    logging.getLogger("tornado.general").setLevel(logging.CRITICAL)
    parameters = with_device(arguments.parameters, arguments.device)
    try:
        with (
            attempt(arguments.attempts, arguments.copy.stem) as this,
            held_gpus(arguments.gpus),
        ):
            if execute(arguments.notebook, parameters, arguments.out, arguments.log):
                this["outcome"] = "failed"
                this["error"] = last_error(arguments.log) or KERNEL_DIED
            else:
                partial = arguments.copy.with_suffix(".partial")
                shutil.copyfile(arguments.log, partial)
                partial.replace(arguments.copy)
                this["outcome"] = "finished"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0 if this["outcome"] == "finished" else 1


if __name__ == "__main__":
    sys.exit(main())
