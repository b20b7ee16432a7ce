"""Compute what several cells need: `share.py NEED --folder DIR --done FILE`.

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

from cells import stop_with_parent
from gpus import held_gpus

from pai_utils.files import write_atomically
from pai_utils.needs import Need, make
from pai_utils.shared import FOLDER, keeping


def share(need: Need, folder: Path) -> list[str]:
    """Compute a need into a folder and return the names of its files there."""
    os.environ[FOLDER] = str(folder)
    with keeping() as names:
        make(need)
    return list(dict.fromkeys(names))


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
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--done", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--gpus", type=Path, help="folder by which processes share the GPUs")
    arguments = parser.parse_args()
    stop_with_parent()
    if arguments.processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={arguments.processes}", __file__]
        command += [json.dumps(arguments.need), "--folder", str(arguments.folder)]
        command += ["--done", str(arguments.done)]
        with held_gpus(arguments.gpus, arguments.processes):
            return subprocess.run(command).returncode
    need = Need(**arguments.need)
    with held_gpus(arguments.gpus) as gpus:
        if gpus and need.device == "auto":
            need = replace(need, device="cuda")
        join_processes()
        names = share(need, arguments.folder)
    if os.environ.get("RANK", "0") == "0":
        write_atomically(arguments.done, json.dumps({"files": names}, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
