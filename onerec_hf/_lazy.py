"""Names that a package exports and imports on first use, so that `import onerec_hf.data` itself costs nothing."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    `__getattr__` and `__dir__` for a package's `__init__.py`.

    Args:
        package: the package's `__name__`.
        modules: for each public name, the module inside the package that defines it.

    Raises:
        AttributeError: from `__getattr__`, for a name that is not in `modules`.

    Example:
        >>> get, names = lazy_exports("xml", {"parse": "dom.minidom"})
        >>> get("parse").__module__, "parse" in names()
        ('xml.dom.minidom', True)
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
