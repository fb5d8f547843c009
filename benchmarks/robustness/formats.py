"""Damage that respects the format: JSON, YAML, tables as text, safetensors, NumPy and Parquet files."""

from __future__ import annotations

import io
import json
import re
import struct
from decimal import Decimal
from random import Random
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    255,
    256,
    2**15,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    2**64,
    10**12,
    10**30,
)
_WORDS = (
    "",
    " ",
    "a",
    "\x00",
    "é",
    "\ud800",
    "x" * 2000,
    "null",
    "NaN",
    "-inf",
    "1e400",
    "1_000",
    "0x10",
    "../../etc/passwd",
    "<a_1>",
    "<z_99999999999>",
    "<c_2147483646>",
    "[]",
    "{}",
    "٣",
)
_LETTERS = "abcdefgh"


def value(generator: Random, depth: int = 0) -> Any:
    """Any JSON value, more often an awkward one."""
    kind = generator.randrange(10)
    if kind < 3:
        return generator.choice(NUMBERS)
    if kind == 3:
        return generator.choice((0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"), 1e-320))
    if kind == 4:
        return generator.choice((None, True, False))
    if kind < 7 or depth > 3:
        return generator.choice(_WORDS)
    if kind == 7:
        return [value(generator, depth + 1) for _ in range(generator.choice((0, 1, 2, 5)))]
    if kind == 8:
        return {generator.choice(_WORDS): value(generator, depth + 1) for _ in range(generator.choice((0, 1, 3)))}
    nested: Any = generator.choice(([], {}, 0))
    for _ in range(generator.choice((2, 30, 400))):
        nested = [nested] if generator.random() < 0.9 else {"a": nested}
    return nested


def edit(generator: Random, tree: Any) -> Any:
    """A JSON tree with one change somewhere."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places or generator.random() < 0.02:
        return value(generator)
    holder, key = generator.choice(places)
    kind = generator.randrange(8)
    if kind < 4:
        holder[key] = value(generator)
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        other, name = generator.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    elif isinstance(holder, dict):
        holder[generator.choice((key + "s", key.upper(), *_WORDS))] = value(generator)
    elif isinstance(holder, list):
        holder[key:key] = [value(generator)] * generator.choice((1, 2, 100))
    return tree


def json_file(generator: Random, content: bytes) -> bytes:
    """A JSON file with a changed tree, at times with a key twice or nested too deep for a recursive reader."""
    text = json.dumps(edit(generator, json.loads(content)), ensure_ascii=generator.random() < 0.5)
    kind = generator.randrange(12)
    if kind == 0:
        pairs = re.findall(r'"[^"]*": [^,{}\[\]]+', text)
        if pairs:
            text = text.replace("{", "{" + generator.choice(pairs) + ", ", 1)
    elif kind == 1:
        deep = generator.choice((500, 5_000, 100_000))
        text = re.sub(r": [^,{}\[\]]+", lambda _: ": " + "[" * deep + "]" * deep, text, count=1)
    elif kind == 2:
        text = re.sub(r"\d+", lambda _: "9" * generator.choice((20, 400, 5000)), text, count=1)
    return text.encode("utf-8", "surrogatepass")


def json_lines(generator: Random, content: bytes) -> bytes:
    """JSON lines, one of them changed, doubled, or swapped for another kind."""
    lines = content.split(b"\n")
    at = generator.randrange(len(lines))
    lines[at] = json_file(generator, lines[at]) if lines[at].strip() else b"null"
    if generator.random() < 0.2:
        lines[at : at + 1] = [lines[at]] * generator.choice((0, 2, 50))
    return b"\n".join(lines)


def yaml_file(generator: Random, content: bytes) -> bytes:
    """A YAML mapping with a changed tree, tags that would make objects, or aliases that unfold."""
    import yaml

    kind = generator.randrange(6)
    if kind == 0:
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True):
            bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        keys = re.findall(rb"^(\w+):", content, re.M) or [b"seed"]
        return bomb.encode() + generator.choice(keys) + b": *i\n"
    if kind == 1 or b"*" in content:  # what aliases unfold to is for the parser to find out
        tag = generator.choice(
            (
                b"!!python/object/apply:os.system ['true']",
                b"!!python/name:os.system",
                b"!!binary eHg=",
                b"!!set {a, b}",
                b"2024-01-01",
                b"!!float nan",
                b"!x y",
            )
        )
        return re.sub(rb": .*", b": " + tag, content, count=1)
    tree = edit(generator, yaml.safe_load(content))
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def text_table(generator: Random, content: bytes, separator: bytes) -> bytes:
    """A table as text with a changed field, line or separator."""
    lines = [line.split(separator) for line in content.split(b"\n")]
    row = generator.randrange(len(lines))
    column = generator.randrange(len(lines[row]))
    kind = generator.randrange(8)
    if kind < 4:
        new = value(generator)
        lines[row][column] = (new if isinstance(new, str) else str(new)[:5000]).encode("utf-8", "surrogatepass")
    elif kind == 4:
        lines[row][column:column] = [b"x"] * generator.choice((1, 1, 300))
    elif kind == 5:
        del lines[row][column]
    elif kind == 6:
        lines[row : row + 1] = [lines[row]] * generator.choice((0, 2, 200))
    else:
        for line in lines:
            if column < len(line):
                line[column] = generator.choice(
                    (
                        b"",
                        b"true",
                        b"2020-01-01",
                        b"1.5",
                        b"007",
                        str(generator.choice(NUMBERS)).encode(),
                        line[column],
                    )
                )
    return b"\n".join(separator.join(line) for line in lines)


def safetensors_file(generator: Random, content: bytes) -> bytes:
    """A safetensors file whose header lies: about shapes, types, offsets, its own length."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    kind = generator.randrange(10)
    if names and kind < 6:
        entry = header[generator.choice(names)]
        if kind == 0:
            entry["dtype"] = generator.choice(
                ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "U64", "X", 3, None)
            )
        elif kind == 1:
            shape = list(entry["shape"])
            shape[generator.randrange(len(shape))] = generator.choice((*NUMBERS, "3", None, 1.5))
            entry["shape"] = shape
        elif kind == 2:
            entry["shape"] = generator.choice(
                ([], [0], [0, 10**12], [2**32, 2**32], [1] * 70, list(reversed(entry["shape"])))
            )
        elif kind == 3:
            entry["data_offsets"][generator.randrange(2)] = generator.choice((*NUMBERS, len(data), len(data) + 1))
        elif kind == 4:  # one tensor laid over another
            entry["data_offsets"] = list(header[generator.choice(names)]["data_offsets"])
        else:
            header[generator.choice(_WORDS[:9])] = header.pop(generator.choice(names))
    elif kind < 8:
        header = edit(generator, header)
    elif kind == 8:
        data = (
            data[: generator.randrange(len(data) + 1)]
            if generator.random() < 0.5
            else data + b"\0" * generator.choice((1, 8, 4096))
        )
    else:
        changed = bytearray(data)
        if changed:  # the values themselves
            at = generator.randrange(len(changed))
            changed[at : at + 8] = struct.pack("<q", generator.choice([n for n in NUMBERS if -(2**63) <= n < 2**63]))
        data = bytes(changed[: len(data)])
    written = json.dumps(header).encode("utf-8", "surrogatepass")
    written += b" " * (-len(written) % 8) if generator.random() < 0.9 else b""
    said = len(written) if generator.random() < 0.95 else generator.choice([n % 2**64 for n in NUMBERS])
    return said.to_bytes(8, "little") + written + data


def npy_file(generator: Random, content: bytes) -> bytes:
    """A NumPy file whose header lies, or names objects, which only a pickle could bring."""
    major = content[6]
    length = 2 if major == 1 else 4
    size = int.from_bytes(content[8 : 8 + length], "little")
    header, data = content[8 + length : 8 + length + size].decode("latin1"), content[8 + length + size :]
    kind = generator.randrange(8)
    if kind < 3:
        descr = generator.choice(
            (
                "'|O'",
                "'<f4'",
                "'>f4'",
                "'<f2'",
                "'<f8'",
                "'<i8'",
                "'|b1'",
                "'<c16'",
                "'<M8[s]'",
                "'|S100000000'",
                "'<U536870911'",
                "'|V8'",
                "[('a', '<f4'), ('b', '|O')]",
                "[('a', '<f4', (2**9,))]",
                "3",
                "''",
                "'<f16'",
            )
        )
        header = re.sub(r"'descr': .*?, 'fortran", f"'descr': {descr}, 'fortran", header)
    elif kind < 5:
        number = generator.choice(NUMBERS)
        shape = generator.choice(
            (
                f"({number}, 4)",
                f"(6, {number})",
                f"({number},)",
                "()",
                "(0, 0)",
                "(0, 4)",
                "(6, 0)",
                f"({10**12}, 0)",
                "(-1, 4)",
                "(True, 4)",
                "(2.0, 4)",
                "6",
                "None",
                "(1,) * 70",
                str((1,) * 70),
            )
        )
        header = re.sub(r"'shape': \(.*?\)", f"'shape': {shape}", header)
    elif kind == 5:
        header = re.sub(
            r"'fortran_order': \w+",
            f"'fortran_order': {generator.choice(('True', 'False', '1', 'None', '[]'))}",
            header,
        )
    elif kind == 6:
        header = generator.choice(
            (
                "(" * 3000,
                "{",
                "__import__('os').system('true')",
                "{'descr': '<f4'}",
                "[" * 90 + "]" * 90,
                "{" + "1:1," * 2000 + "}",
                "-" * 5000 + "1",
                "'a'" * 3000,
                header * 30,
                "\u00e9",
            )
        )
    else:
        data = (
            data[: generator.randrange(len(data) + 1)]
            if generator.random() < 0.5
            else data + b"\0" * generator.choice((1, 16, 4096))
        )
    written = header.rstrip().encode("latin1") + b"\n"
    said = len(written) if generator.random() < 0.95 else generator.choice((0, 1, 2**16 - 1, 2 ** (8 * length) - 1))
    version = bytes([major, 0]) if generator.random() < 0.95 else bytes([generator.choice((0, 2, 3, 9)), 0])
    return b"\x93NUMPY" + version + min(said, 2 ** (8 * length) - 1).to_bytes(length, "little") + written + data


def parquet_file(generator: Random, content: bytes) -> bytes:
    """A Parquet file with a column of another kind, or written another way."""
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(content))
    rows = table.num_rows
    at = generator.randrange(table.num_columns)
    name = table.column_names[at]
    kind = generator.randrange(5)
    if kind < 3:
        table = table.set_column(at, name, _column(generator, rows, table.column(at)))
    elif kind == 3:
        table = table.rename_columns(
            [generator.choice((*_WORDS[3:5], "item_id", n)) if n == name else n for n in table.column_names]
        )
    else:
        table = table.slice(0, generator.choice((0, 1, rows)))
    out = io.BytesIO()
    codec = generator.choice(("snappy", "zstd", "gzip", "none"))
    pq.write_table(
        table,
        out,
        compression=codec,
        use_dictionary=generator.random() < 0.5,
        row_group_size=generator.choice((1, 3, 1000)),
        store_schema=generator.random() < 0.7,
    )
    return out.getvalue()


def _column(generator: Random, rows: int, given: Any) -> Any:
    """`rows` values of some type that Parquet knows."""
    import pyarrow as pa

    numbers = [generator.choice(NUMBERS[:9]) for _ in range(rows)]
    small = [abs(n) % 100 for n in numbers]
    holes = [None if generator.random() < 0.3 else n for n in small]
    kinds: list[Any] = [
        lambda: given.cast(pa.large_string()),
        lambda: given.cast(pa.string()).dictionary_encode(),
        lambda: pa.array(numbers, pa.float64()),
        lambda: pa.array(small, pa.float16()),
        lambda: pa.array([n % 2**64 for n in numbers], pa.uint64()),
        lambda: pa.array([n % 2 == 0 for n in small]),
        lambda: pa.array(holes, pa.int64()),
        lambda: pa.array(
            holes,
            pa.timestamp(generator.choice(("s", "ms", "us", "ns")), tz=generator.choice((None, "UTC", "Asia/Tokyo"))),
        ),
        lambda: pa.array([10**17] * rows, pa.timestamp("us")),  # beyond what pandas counts in nanoseconds
        lambda: pa.array(holes, pa.date32()),
        lambda: pa.array(holes, pa.time64("us")),
        lambda: pa.array(holes, pa.duration("ms")),
        lambda: pa.array([None if n is None else Decimal(n) for n in holes], pa.decimal128(20, 3)),
        lambda: pa.array([str(n).encode() + b"\xff" for n in small], pa.binary()),
        lambda: pa.array([[n] * (n % 4) for n in small]),
        lambda: pa.array([[[n]] for n in small]),
        lambda: pa.array([{"a": n} for n in small]),
        lambda: pa.array([[("k", n)] for n in small], pa.map_(pa.string(), pa.int64())),
        lambda: pa.nulls(rows),
        lambda: pa.array([generator.choice(("a", "\x00", "é", "")) for _ in small]),
        lambda: pa.array(["x" * 2**16] * rows),
    ]
    return generator.choice(kinds)()
