"""Load files that register ops, passes, targets or models from outside the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dsv3c.errors import Dsv3cError, InputError


def load_plugin(path: str | Path) -> ModuleType:
    """Execute a Python file once, for what it registers; asked for again, it gives the same module.

    Raises InputError if there is no such file or it fails, saying how.
    """
    file = Path(path).resolve()
    name = f"dsv3c_plugin_{file.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise InputError(f"--plugin {path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Dsv3cError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"--plugin {path}: failed with {type(error).__name__}: {error}") from error
    return module
