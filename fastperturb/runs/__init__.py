"""Shared by all commands: option files, run folders, worker processes and provenance."""

from fastperturb.runs.provenance import (
    commit,
    cpu_flags,
    cpu_model,
    device,
    provenance,
    torch_device,
    versions,
)
from fastperturb.runs.run_folder import open_output_dir, write_json

__all__ = [
    "commit",
    "cpu_flags",
    "cpu_model",
    "device",
    "open_output_dir",
    "provenance",
    "torch_device",
    "versions",
    "write_json",
]
