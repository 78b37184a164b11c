"""The version of armopt, which the package and its build read, and the torch that it knows."""

__version__ = "0.1.0"
#: As pyproject.toml has it.
TORCH_REQUIREMENT = "torch>=2.10,<2.16"
