"""Compute what several cells need: `share.py NEED --before FILE... --out FILE`.

The need is JSON, as `planned.py` writes it. With `--processes N` the images of a score are shared
by N processes of `torchrun`, each with a GPU of its own if there are GPUs.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cells import stop_with_parent
from machine import held_gpus

from pai_utils.needs import Need, make
from pai_utils.support.cache import FOLDER, gather, keeping
from pai_utils.support.stored import write_atomically


def share(need: Need, before: list[Path], out: Path) -> None:
    """Compute a need from files of what comes before it, into a file."""
    with TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        gather(before, Path(folder))
        with keeping() as names:
            make(need)
        # Others, such as the head of a score, are what it was made from.
        own = [name for name in names if name.startswith(f"{need.kind}-")][-1]
        if os.environ.get("RANK", "0") == "0":
            write_atomically(out, (Path(folder) / own).read_bytes())


def join_processes() -> None:
    """Take part in the work of `torchrun`, if it started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch

    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo")


def main() -> int:
    """Compute what the command line names."""
    parser = argparse.ArgumentParser(description="Compute what several cells need.")
    parser.add_argument("need", type=json.loads)
    parser.add_argument("--before", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", help="in the place of `auto`")
    parser.add_argument("--gpus", type=Path, help="folder by which processes share the GPUs")
    arguments = parser.parse_args()
    stop_with_parent()
    if arguments.processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={arguments.processes}", __file__]
        command += [json.dumps(arguments.need), "--out", str(arguments.out)]
        command += ["--before", *map(str, arguments.before)]
        command += ["--device", arguments.device] if arguments.device else []
        with held_gpus(arguments.gpus, arguments.processes):
            return subprocess.run(command).returncode
    need = Need(**arguments.need)
    if arguments.device and need.device == "auto":
        need = replace(need, device=arguments.device)
    with held_gpus(arguments.gpus):
        join_processes()
        share(need, arguments.before, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
