"""What is unpickled while something runs, by Python's own audit events."""

import contextlib
import sys
from collections.abc import Iterator

_listening: list[list[str]] = []


def _hear(event: str, arguments: tuple) -> None:
    if not _listening or event not in ("pickle.find_class", "marshal.loads", "marshal.load"):
        return
    frame = sys._getframe(1)
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    if event.startswith("marshal") and frame.f_code.co_filename.startswith("<frozen importlib"):
        return  # a module's own bytecode
    what = ".".join(map(str, arguments)) if event == "pickle.find_class" else ""
    for heard in _listening:
        heard.append(f"{event} {what} at {where}")


sys.addaudithook(_hear)  # for good: Python takes none away


@contextlib.contextmanager
def heard_unpickling() -> Iterator[list[str]]:
    """A list that gets a line per object that is unpickled inside, or code that is unmarshalled by anything but an import."""
    heard: list[str] = []
    _listening.append(heard)
    try:
        yield heard
    finally:
        _listening.remove(heard)
