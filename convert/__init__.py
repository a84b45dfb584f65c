"""Docker and OCI images into SIF files: the converter.  It stands on sciexec; nothing of it is imported by a run."""
