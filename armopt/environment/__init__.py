"""The environment of a process: what a target wants of it, what this host has, and how they differ."""

from armopt.environment.build import CPU_TORCH, installed, library_identity, package_folder, record, thp_setting
from armopt.environment.compare import Difference, differences
from armopt.environment.cores import cores_for_workers
from armopt.environment.formats import FORMATS, render
from armopt.environment.fpmath import FPMATH, FPMATH_NAMES, fast_math
from armopt.environment.memory import memory_for_process
from armopt.environment.process import for_process, import_remark, late_variables
from armopt.environment.threads import threads_for_host
from armopt.environment.variables import (
    FRAMEWORKS,
    PRELOAD,
    Variable,
    allocator_library,
    only_read,
    recorded,
    wanted,
)

__all__ = [
    "CPU_TORCH",
    "FORMATS",
    "FPMATH",
    "FPMATH_NAMES",
    "FRAMEWORKS",
    "PRELOAD",
    "Difference",
    "Variable",
    "allocator_library",
    "cores_for_workers",
    "differences",
    "fast_math",
    "for_process",
    "import_remark",
    "installed",
    "late_variables",
    "library_identity",
    "memory_for_process",
    "only_read",
    "package_folder",
    "record",
    "recorded",
    "render",
    "thp_setting",
    "threads_for_host",
    "wanted",
]
