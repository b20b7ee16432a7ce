"""Compute a cell's scores with several GPUs: `share.py NOTEBOOK --parameters JSON --out FILE`.

Where a score takes hours on one GPU, its images are shared by processes of `torchrun`, each with a
GPU of its own if there are GPUs. The scores go to the cache, where the cell finds them.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cells import stop_with_parent, use_cache, with_device
from machine import held_gpus

from pai_utils.support.stored import write_atomically


def scores(config: Any) -> list[str]:
    """Compute the scores of a study's encoder on its sources; returns what was computed."""
    from estimates import sources_of

    from pai_utils.scorers import find_scorer
    from pai_utils.studies.suite import Suite

    suite = Suite.load(config, heads=getattr(config, "heads", "linear"))
    done = []
    for name, recipe in {recipe.scorer: recipe for recipe in config.recipes}.items():
        for source in sources_of(config) if find_scorer(name).needs_data else []:
            for seed in getattr(config, "seeds", [config.seed]):
                draw = replace(config.draw, seed=seed)
                suite.score(recipe, suite.source(source, seed=seed), draw)
                done.append(f"{name} {source} {seed}")
    return done


def main() -> int:
    """Compute what the command line names."""
    parser = argparse.ArgumentParser(description="Compute a cell's scores with several GPUs.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--parameters", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", help="in the place of `auto`")
    parser.add_argument("--gpus", type=Path, help="folder by which processes share the GPUs")
    arguments = parser.parse_args()
    stop_with_parent()
    use_cache()
    from pai_utils.studies.parameters import read_parameters

    parameters = with_device(arguments.parameters, arguments.device)
    config = read_parameters(arguments.notebook, parameters)
    if arguments.processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={arguments.processes}", *sys.argv, "--processes=1"]
        with held_gpus(arguments.gpus, arguments.processes):
            return subprocess.run(command).returncode
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    done = scores(config)
    if torch.distributed.get_rank() == 0:
        write_atomically(arguments.out, "\n".join(done).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
