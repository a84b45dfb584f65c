"""Run scientific software out of one file: the runtime.  Nothing is imported here, every start of a container passes by."""

__version__ = "0.1.0"

# Programs parse these lines.  The numbers are those of the releases that their callers see the least difference to.
VERSIONS = {
    "apptainer": f"apptainer version 1.4.5+sciexec.{__version__}",
    "singularity": f"singularity-ce version 4.3.1+sciexec.{__version__}",
}


def called(program: str) -> str:
    """The name under which the caller knows us.  program: argv[0] or its last part; as a module (python -m) it is a file of ours."""
    return "sciexec" if program.endswith(".py") else program.rpartition("/")[2]


def version(program: str) -> str:
    """What --version answers under the name `program`."""
    return VERSIONS.get(called(program), f"sciexec version {__version__}")
