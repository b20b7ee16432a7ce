"""Run a command beside a SLURM of its own on this computer: `slurm_here.py COMMAND...`.

For tests of the profile `slurm`: controller, one node and authentication run on loopback from a
temporary folder, and end with the command. It takes root and Debian's packages `slurm-wlm` and
`munge`.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from machine import memory_mib

USUAL = Path("/etc/slurm/slurm.conf")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch", "squeue")
CONFIGURATION = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory}
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Start a SLURM that keeps everything in `folder`; it runs as long as the context.

    Raises:
        OSError: A program is missing, or the node does not come up within half a minute.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise OSError(f"{missing[0]} is missing: apt-get install slurm-wlm munge")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    with socket.socket() as first, socket.socket() as second:
        ports = []
        for listener in (first, second):
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    configuration.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            controller_port=ports[0],
            node_port=ports[1],
            folder=folder,
            cpus=os.cpu_count(),
            memory=memory_mib() * 95 // 100,
        )
    )
    # Jobs look for it at the usual place: the engine takes SLURM's variables from them.
    if USUAL.exists():
        raise OSError(f"this computer has a SLURM already, of {USUAL}")
    USUAL.parent.mkdir(exist_ok=True)
    USUAL.unlink(missing_ok=True)  # of a run that was killed
    USUAL.symlink_to(configuration)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
    munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    started: list[subprocess.Popen[bytes]] = []
    with (folder / "output.log").open("wb") as output:
        try:
            for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
                started.append(subprocess.Popen(command, stdout=output, stderr=output))
                time.sleep(0.5)  # each asks the one before
            for _ in range(60):
                asked = ["sinfo", "--noheader", "--format=%T"]
                found = subprocess.run(asked, capture_output=True, text=True)
                if found.stdout.strip() == "idle":
                    break
                time.sleep(0.5)
            else:
                log = (folder / "output.log").read_text(errors="replace")
                raise OSError(f"SLURM did not start:\n{log[-2000:]}")
            yield
        finally:
            for process in reversed(started):  # those that need the others first
                process.terminate()
                process.wait()
            USUAL.unlink()


def main() -> int:
    """Run what the command line names."""
    command = sys.argv[1:]
    if not command:
        print("usage: slurm_here.py COMMAND...", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        try:
            with slurm(Path(folder)):
                return subprocess.run(command).returncode
        except OSError as error:
            print(f"slurm_here: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
