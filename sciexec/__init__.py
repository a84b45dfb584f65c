"""Run scientific software out of one file: the runtime.  Nothing is imported here, every start of a container passes by."""

__version__ = "0.1.0"

# Programs parse these lines.  The numbers are those of the releases that their callers see the least difference to.
VERSIONS = {
    "apptainer": f"apptainer version 1.4.5+sciexec.{__version__}",
    "singularity": f"singularity-ce version 4.3.1+sciexec.{__version__}",
}


def version(program: str) -> str:
    """What --version answers under the name `program` (argv[0] or its last part)."""
    return VERSIONS.get(program.rpartition("/")[2], f"sciexec version {__version__}")
