"""How a delimited text file quotes its fields: many tab-separated files do not, and a title may begin with a quote there."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Callable, Iterable
from typing import IO, Literal

from onerec_hf.data.columns import DataError

#: No quote in the file; quotes are characters like others; each quoted field stands within its line; quoted fields hold separators or line ends.
Quoting = Literal["absent", "off", "fields", "spanning"]
_BLOCK = 2**20
_WHOLE = re.compile(rb'"(?:[^"]|"")*"')


def quoting(opened: Callable[[], IO[bytes]], separator: str) -> Quoting:
    """
    Whether and how quotes enclose fields. Where they do not, rows between two quotes would become one field.

    A file is unquoted if each line holds as many separators as the first one, and in some line a field begins with a quote that does not end it.

    Args:
        opened: opens the file at its beginning.
        separator: between fields.

    Raises:
        DataError: a quoted field that ends neither before a separator nor at the end of a line.

    Warns:
        UserWarning: lines that can be read in both ways: quotes enclose fields between commas, and do not between tabs.

    Example:
        >>> quoting(lambda: io.BytesIO(b'id\\ttitle\\n1\\t"Heroes\\n2\\tLow\\n3\\t"Helden\\n'), "\\t")
        'off'
        >>> quoting(lambda: io.BytesIO(b'id,title\\n1,"Low, Heroes"\\n2,"a ""b"" c"\\n'), ",")
        'spanning'
    """
    with opened() as file:
        if not any(b'"' in block for block in iter(lambda: file.read(_BLOCK), b"")):
            return "absent"
    with opened() as file:
        regular, open_line = _lines(file, separator.encode())
    if regular and not open_line:
        return "fields"
    with opened() as file:
        broken = _broken(file, separator)
    if not regular and broken:
        raise DataError(
            f"line {broken[0]}: {broken[1]}. Double the quotes inside of fields, or write the file without quotes and separators in them."
        )
    if regular and not broken:
        quoted = separator == ","
        read = "its lines are one field" if quoted else "each of its lines is a row"
        warnings.warn(
            f"line {open_line}: a field begins with a quote, and a later line ends one; {read}. If that is wrong, write the table as Parquet."
        )
        return "spanning" if quoted else "off"
    return "off" if regular else "spanning"


def _lines(file: Iterable[bytes], separator: bytes) -> tuple[bool, int]:
    """
    Whether every line has the same number of fields without quoting, and the first line in which a field begins with a quote and does not end
    with it; 0 where there is none.
    """
    expected, open_line, inner = -1, 0, separator + b'"'
    for number, line in enumerate(file, start=1):
        line = line.rstrip(b"\r\n")
        if not line:
            continue
        count = line.count(separator)
        expected = count if expected < 0 else expected
        if count != expected:
            return False, open_line
        if not open_line and b'"' in line and (line.startswith(b'"') or inner in line):
            fields = line.split(separator)
            open_line = 0 if all(not f.startswith(b'"') or _WHOLE.fullmatch(f) for f in fields) else number
    return True, open_line


def _broken(file: IO[bytes], separator: str) -> tuple[int, str] | None:
    """The line and the reason where the file is not well quoted."""
    if len(separator) > 1:
        return 1, "the separator has several characters, and quotes enclose fields"
    rows = csv.reader(
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="", errors="replace"), delimiter=separator, strict=True
    )
    limit = csv.field_size_limit(2**31 - 1)
    try:
        for _ in rows:
            pass
    except csv.Error as error:
        return rows.line_num, str(error).replace("'\"'", "a quote")
    finally:
        csv.field_size_limit(limit)
    return None
