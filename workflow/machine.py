"""What this computer has: its memory, and its GPUs for processes that ask for one.

A scheduler such as SLURM gives every job its own GPUs. On one computer without any, a file for
each GPU is locked by the process that uses it; locks end with their process, however it ends.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"


def memory_mib() -> int:
    """Return the memory of this computer, or what a container leaves of it."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return (pages if text == "max" else min(pages, int(text))) // 2**20


def gpus() -> list[str]:
    """Return the names, for `CUDA_VISIBLE_DEVICES`, of the GPUs that this process may use.

    The driver is asked, not torch, which takes seconds to import.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return asked.stdout.split() if asked.returncode == 0 else []


@contextmanager
def held_gpus(folder: Path | None, count: int = 1) -> Iterator[list[str]]:
    """Hold GPUs and let this process and its children see no other; yields their names.

    Without a folder none is held: the computer has none, or a scheduler gives them out. Where
    others hold them, this waits; the workflow starts no more processes than there are GPUs.

    Raises:
        OSError: The computer shows fewer GPUs.
    """
    if folder is None:
        yield []
        return
    names = gpus()
    if len(names) < count:
        raise OSError(f"{count} GPUs were to be used and {len(names)} are there: was one lost?")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        while len(held := _free(names, folder, count, locks)) < count:
            locks.close()  # all or none: two that wait for each other would wait for ever
            time.sleep(0.2)
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = ",".join(held)
        try:
            yield held
        finally:
            os.environ.pop(VISIBLE)
            if before is not None:
                os.environ[VISIBLE] = before


def _free(names: list[str], folder: Path, count: int, locks: ExitStack) -> list[str]:
    """Lock up to `count` GPUs that nobody holds and return their names."""
    held: list[str] = []
    for name in names:
        with suppress(Timeout):
            if len(held) < count:
                locks.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
                held.append(name)
    return held
