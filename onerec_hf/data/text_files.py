"""Reads delimited text and JSON files, compressed or not, with and without a header, as tables."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pandas as pd

from onerec_hf.data.aliases import ALIASES, RARER, usual_column
from onerec_hf.data.columns import MISSING_TEXT, DataError, check_width
from onerec_hf.data.compressed import open_table, table_name
from onerec_hf.data.quoting import Quoting, quoting

#: Field separators by suffix; another one is taken where the first line holds it and not this one.
SEPARATORS = {".csv": ",", ".tsv": "\t", ".data": "\t", ".dat": "::", ".txt": "\t"}
_OTHERS = ("\t", "::", ";", ",", "|")


def read_delimited(path: Path, text_columns: Sequence[str | None], names: Sequence[str] | None = None) -> pd.DataFrame:
    """
    A delimited file as a table. Rows without any value, such as `,,,`, are left out.

    Args:
        path: a file with a suffix of `SEPARATORS`, or of these and a compression.
        text_columns: columns to read as text.
        names: the columns of a file without a header.

    Raises:
        DataError: no fields, columns that occur more than once, a wrong number of `names`, fields that are not well quoted.
        OSError, ValueError: what pandas does not read.

    Warns:
        UserWarning: rows without values were left out (with their number).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "u.data")
        ...     _ = path.write_text("196\\t242\\t881250949\\n186\\t302\\t891717742\\n")
        ...     read_delimited(path, (), ["user_id", "item_id", "timestamp"])["item_id"].tolist()
        [242, 302]
    """
    content = open_table(path)
    with content:
        form = layout(lambda: _rewound(content), table_name(path).suffix, names, path)
        text = {usual_column(form.columns, column) for column in text_columns if column} & set(form.columns)
        with _rewound(content) as file, warnings.catch_warnings():
            # Otherwise pandas drops surplus fields of a row, or shifts all columns by one.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            try:
                table: Any = pd.read_csv(
                    file,
                    dtype=dict.fromkeys(text, str),
                    na_values={column: [""] if column in text else MISSING_TEXT for column in form.columns},
                    **form.pandas_options(names),
                )
            except pd.errors.ParserWarning as error:
                with _rewound(content) as again:
                    raise DataError(f"{path}: {_surplus(again, form) or error}") from error
    empty = table.isna().all(axis=1).to_numpy() & (len(table.columns) > 1)
    if empty.any():
        warnings.warn(
            f"{path}: left out {empty.sum():,} of {len(table):,} rows that have no value (first: row {int(empty.argmax())})."
        )
        table = table.loc[~empty].reset_index(drop=True)
    return table


def _surplus(file: IO[bytes], form: Layout) -> str:
    """What is wrong with the first line that has more fields than there are columns, which pandas does not name; empty where there is none."""
    columns = len(form.columns)
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
        fields = fields_of(line.rstrip("\r\n"), form.separator, form.quoting in ("fields", "spanning"))
        if len(fields) > columns:
            return f"line {number} has {len(fields)} fields and the first line {columns}. Quote fields that hold the separator."
    return ""


class Layout(NamedTuple):
    """
    How a delimited file is written.

    Args:
        separator: between fields.
        quoting: see [`~onerec_hf.data.quoting.quoting`].
        columns: names of the columns.
    """

    separator: str
    quoting: Quoting
    columns: list[str]

    def pandas_options(self, names: Sequence[str] | None) -> dict[str, Any]:
        """Arguments of `pandas.read_csv`, apart from types and missing values."""
        return {
            "sep": self.separator,
            "engine": "python" if len(self.separator) > 1 else "c",
            "encoding": "utf-8-sig",
            "header": None if names else 0,
            "names": self.columns,
            "index_col": False,
            "keep_default_na": False,
            "quoting": csv.QUOTE_NONE if self.quoting == "off" else csv.QUOTE_MINIMAL,
            **({} if len(self.separator) > 1 else {"low_memory": False}),
        }


def layout(opened: Callable[[], IO[bytes]], suffix: str, names: Sequence[str] | None, where: Any) -> Layout:
    """
    The layout of a file.

    Args:
        opened: opens the file at its beginning.
        suffix: a key of `SEPARATORS`.
        names: the columns of a file without a header.
        where: the file's name, for messages.

    Raises:
        DataError: as `quoting` and `column_names`.

    Example:
        >>> layout(lambda: io.BytesIO(b"user_id;item_id\\n1;2\\n"), ".csv", None, "a.csv")
        Layout(separator=';', quoting='absent', columns=['user_id', 'item_id'])
    """
    with opened() as file:
        line = first_line(file)
    separator = separator_of(line, suffix)
    how = quoting(opened, separator)
    fields = fields_of(line, separator, how in ("fields", "spanning"))
    check_width(len(fields), where)
    return Layout(separator, how, column_names(fields, names, where))


def _rewound(content: IO[bytes]) -> IO[bytes]:
    """The same bytes from the beginning, in a file that its reader may close."""
    content.seek(0)
    if isinstance(content, io.BytesIO):
        return io.BytesIO(content.getbuffer())
    return open(content.name, "rb")


def first_line(file: IO[bytes]) -> str:
    """
    The first line that is not empty, as text.

    Raises:
        DataError: lines that end with a carriage return alone.

    Example:
        >>> first_line(io.BytesIO(b"\\nuser_id,item_id\\n"))
        'user_id,item_id'
    """
    line = next((line for line in file if line.strip()), b"").decode("utf-8-sig").rstrip("\r\n")
    if "\r" in line and '"' not in line:
        raise DataError("lines end with a carriage return alone. Write the file with \\n.")
    return line


def separator_of(line: str, suffix: str) -> str:
    """
    The field separator of a file: that of its suffix, or another one that its first line holds in place of it.

    Example:
        >>> separator_of("user_id;item_id", ".csv"), separator_of("1::1193::5", ".dat"), separator_of("user_id", ".csv")
        (';', '::', ',')
    """
    usual = SEPARATORS[suffix]
    return next((each for each in (usual, *_OTHERS) if each in line), usual)


def fields_of(line: str, separator: str, quoted: bool) -> list[str]:
    """
    The fields of a line.

    Example:
        >>> fields_of('"user, id",item_id', ",", quoted=True)
        ['user, id', 'item_id']
    """
    if quoted and len(separator) == 1:
        return next(iter(csv.reader([line], delimiter=separator)), [])
    return line.split(separator)


def column_names(fields: list[str], names: Sequence[str] | None, where: Any) -> list[str]:
    """
    The columns of a table: the names that were passed, or those in its first line.

    Raises:
        DataError: a wrong number of names, or one that occurs more than once.

    Example:
        >>> column_names(["196", "242"], ["user_id", "item_id"], "u.data"), column_names(["", "item_id"], None, "a.csv")
        (['user_id', 'item_id'], ['Unnamed: 0', 'item_id'])
    """
    if names is not None and len(names) != len(fields):
        raise DataError(
            f"{where}: {len(names)} column names for {len(fields)} fields in the first line. Name each field, in the order of the file."
        )
    columns = [name or f"Unnamed: {place}" for place, name in enumerate(names or fields)]
    repeated = [column for column in columns if columns.count(column) > 1] if len(set(columns)) < len(columns) else []
    if repeated:
        hint = " If the file has no header, pass --column_names." if repeated[0].replace(".", "").isdecimal() else ""
        raise DataError(f"{where}: column {repeated[0]!r} occurs more than once. Rename or drop one of them.{hint}")
    return columns


def read_lines_per_user(path: Path) -> pd.DataFrame | None:
    """
    A .txt file with a user and then items in each line, separated by blanks, tabs or commas: `user_id` and lists in `item_id`. None for a
    file whose first line names columns.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "Beauty.txt")
        ...     _ = path.write_text("1 5 6 7\\n2 8 5\\n")
        ...     read_lines_per_user(path).to_dict("list")
        {'user_id': ['1', '2'], 'item_id': [['5', '6', '7'], ['8', '5']]}
    """
    with open_table(path) as file:
        if has_header(first_line(file)):
            return None
        file.seek(0)
        lines = [line.replace(",", " ").split() for line in io.TextIOWrapper(file, encoding="utf-8-sig")]
    lines = [line for line in lines if line]
    return pd.DataFrame(
        {"user_id": pd.Series([line[0] for line in lines], dtype=object), "item_id": [line[1:] for line in lines]}
    )


def has_header(line: str) -> bool:
    """
    Whether the first line of a .txt file names columns.

    Example:
        >>> has_header("userId,movieId,rating"), has_header("1 5 6 7")
        (True, False)
    """
    words = {word.strip("\"'").lower().replace("_", "") for word in line.replace(",", " ").replace(";", " ").split()}
    return bool(words & {name for kind in (ALIASES, RARER) for names in kind.values() for name in names})


def read_json(path: Path) -> pd.DataFrame:
    """
    JSON objects, one a line or in one array, or one object of columns.

    Raises:
        ValueError: anything else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.json")
        ...     _ = path.write_text('[{"item_id": 7}, {"item_id": 8}]')
        ...     read_json(path)["item_id"].tolist()
        [7, 8]
    """
    with open_table(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        lines = table_name(path).suffix != ".json" or _is_lines(text)
        rows: Any = (
            [(n, json.loads(line)) for n, line in enumerate(text, start=1) if line.strip()]
            if lines
            else json.load(text)
        )
    if lines:
        for number, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
        return _whole_characters(_records([row for _, row in rows]))
    if isinstance(rows, list):
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"entry {number} of the array is not a JSON object")
        return _whole_characters(_records(rows))
    columns = {name: list(column.values()) if isinstance(column, dict) else column for name, column in rows.items()}
    if not all(isinstance(column, list) for column in columns.values()) or len(set(map(len, columns.values()))) > 1:
        raise ValueError("expected an array of objects, an object a line, or an object of columns of equal length")
    return _whole_characters(pd.DataFrame({name: _column(column) for name, column in columns.items()}))


def _whole_characters(table: pd.DataFrame) -> pd.DataFrame:
    """
    The table itself.

    Raises:
        ValueError: JSON can write half a character (`\\ud83d` without what follows it), which no other file and no id can hold.
    """
    for place, name in enumerate(table.columns):
        column = table.iloc[:, place]
        if column.dtype != object:
            continue
        for row, value in enumerate(column):
            if isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise ValueError(
                        f"row {row}: {value!r:.80} in column {name!r} holds half a character. Write the file again without it"
                    ) from None
    return table


def _is_lines(text: io.TextIOWrapper) -> bool:
    """Whether a .json file holds an object in each line, as many do; one line whose values are all lists or objects holds columns."""
    lines = [line for line, _ in zip((line for line in text if line.strip()), range(2), strict=False)]
    text.seek(0)
    try:
        row = json.loads(lines[0]) if lines else None
    except ValueError:
        return False
    return isinstance(row, dict) and (
        len(lines) > 1 or not all(isinstance(value, list | dict) for value in row.values())
    )


def _records(rows: list[dict]) -> pd.DataFrame:
    names = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in names}, index=range(len(rows)))


def _column(values: list) -> pd.Series:
    """Values as they are: integers with missing ones among them would become floats, which change long ones."""
    kinds = {type(value) for value in values}
    if kinds == {int, type(None)} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pd.Series(values, dtype="Int64")
    column = pd.Series(values, dtype=object)
    return column if str in kinds else column.infer_objects()
