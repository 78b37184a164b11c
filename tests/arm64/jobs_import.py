"""What test_import_remark.py sends to the emulated side, where the worker has imported torch already."""

import sys
import warnings


def remark():
    """What a first `import armopt` says in this process."""
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "armopt"}
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            import armopt  # noqa: F401
        return [str(warning.message) for warning in said if "torch was imported before armopt" in str(warning.message)]
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "armopt"]:
            del sys.modules[name]
        sys.modules.update(held)
