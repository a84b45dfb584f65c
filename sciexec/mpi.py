"""What MPI launchers tell a rank of itself, in variables and by being its parent.

    launcher             how many ranks on this node          which step
    srun                 SLURM_STEP_TASKS_PER_NODE, by node   SLURM_JOB_ID, SLURM_STEP_ID
    Open MPI, PRRTE      OMPI_COMM_WORLD_LOCAL_SIZE           PMIX_NAMESPACE
    Hydra (MPICH, Intel) MPI_LOCALNRANKS                      the process that starts the ranks of a node
    MVAPICH              MV2_COMM_WORLD_LOCAL_SIZE            the same
    PALS (Cray)          PALS_LOCAL_SIZE                      PALS_APID

Sources: srun(1), "Output Environment Variables"; Open MPI's FAQ on its variables; MPICH, src/pm/hydra; HPE, pals.h.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE", "PALS_LOCAL_SIZE")
STEPS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PALS_APID")
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")
# Processes that start the ranks of one node, or one step's; a shell or numactl may stand between them and a rank.
STARTERS = frozenset("hydra_pmi_proxy hydra_bstrap_pr orted prted prterun mpirun mpiexec mpiexec.hydra slurmstepd palsd flux-shell".split())
NAME_LENGTH = 15  # bytes of a process's name that the kernel keeps
ANCESTORS = 8


def local_size(environ: Mapping[str, str]) -> int:
    """How many ranks of this rank's step run on this node, as far as its launcher says; 0 where nothing does."""
    sizes = [int(value) for name in LOCAL_SIZES if (value := environ.get(name, "")).isdecimal()]
    return max([*sizes, slurm_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), environ.get("SLURM_NODEID", ""))])


def slurm_tasks(text: str, node: str) -> int:
    """The tasks on node number `node` of a list as "4(x2),3": four on each of the first two nodes, three on the next."""
    left = int(node) if node.isdecimal() else 0
    for item in text.split(","):
        count, _, times = item.rstrip(")").partition("(x")
        if not count.isdecimal():
            return 0
        left -= int(times) if times.isdecimal() else 1
        if left < 0:
            return int(count)
    return 0


def step(environ: Mapping[str, str]) -> str:
    """A name for this rank's step on this node, the same for all its ranks and for no other's that run at the same time."""
    named = [f"{name}={environ[name]}" for name in STEPS if environ.get(name)]
    return " ".join(named if any(not name.startswith("SLURM_JOB_ID") for name in named) else [*named, starter()])


def job(environ: Mapping[str, str]) -> str:
    """A name for the batch job; outside of one, the step's."""
    named = [f"{name}={environ[name]}" for name in JOBS if environ.get(name)]
    return " ".join(named) or step(environ)


def starter() -> str:
    """The process that started this rank and its neighbours, by id and start time; the parent, where none is known to be that."""
    pid, parent = "self", ""
    for _ in range(ANCESTORS):
        try:
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                name, _, rest = file.read().partition(b"(")[2].rpartition(b")")
        except OSError:
            break
        fields = rest.split()
        here = f"process {pid} of {fields[19].decode()}"
        if pid != "self":
            parent = parent or here
            if name.decode("ascii", "replace") in STARTER_NAMES:
                return here
        pid = fields[1].decode()
        if pid in ("0", "1"):
            break
    return parent


STARTER_NAMES = frozenset(name[:NAME_LENGTH] for name in STARTERS)
