"""Other names of the user, item and time columns in public datasets and event logs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from onerec_hf.data.columns import DataError

#: Names without case, blanks, dashes and underscores, by the default name of the column.
ALIASES: dict[str, tuple[str, ...]] = {
    "user_id": (
        "userid",
        "user",
        "uid",
        "users",
        "reviewerid",
        "customerid",
        "customer",
        "visitorid",
        "memberid",
        "accountid",
    ),
    "item_id": (
        *(
            "itemid",
            "item",
            "iid",
            "movieid",
            "movie",
            "filmid",
            "asin",
            "parentasin",
            "videoid",
            "productid",
            "product",
            "articleid",
        ),
        *(
            "newsid",
            "songid",
            "trackid",
            "artistid",
            "bookid",
            "isbn",
            "businessid",
            "gameid",
            "appid",
            "sku",
            "listingid",
            "poi",
        ),
        *("itemids", "items", "itemsequence", "itemseq", "sequence", "history"),
    ),
    "timestamp": (
        *(
            "timestamp",
            "timestamps",
            "time",
            "times",
            "timems",
            "ts",
            "unixtime",
            "unixreviewtime",
            "unixtimestamp",
            "eventtime",
        ),
        *("eventtimestamp", "datetime", "date", "createdat", "epoch"),
    ),
}
#: Names that stand beside one of those above in some tables, and mean the column only where there is none of them.
RARER: dict[str, tuple[str, ...]] = {
    "item_id": ("stockcode",),
    "timestamp": (
        *("orderdate", "invoicedate", "purchasedate", "transactiondate", "tdat", "playedat", "clickedat", "viewedat"),
    ),
}


def find_column(columns: Iterable, name: str, what: str) -> str:
    """
    The column with this name; for a default name that is absent, the one column with another usual name for it.

    Args:
        columns: of the table.
        name: the wanted one.
        what: the default name: "user_id", "item_id" or "timestamp".

    Returns:
        A name from `columns`, or `name` where none fits; the caller then names what is missing.

    Raises:
        DataError: several columns have usual names.

    Warns:
        UserWarning: a column with another name was taken.

    Example:
        >>> find_column(["user_id", "movieId"], "user_id", "user_id")
        'user_id'
        >>> find_column(["person", "movieId"], "user_id", "user_id")
        'user_id'
    """
    found = usual_column(columns, name, what)
    if found != name:
        warnings.warn(f"column {found!r} is read as {what}.")
    return found


def usual_column(columns: Iterable, name: str, what: str | None = None) -> str:
    """
    `find_column` without a warning.

    Raises:
        DataError: several columns have usual names.

    Example:
        >>> usual_column(["userId", "movieId"], "item_id")
        'movieId'
    """
    names = [each for each in columns if isinstance(each, str)]
    what = what or name
    if name != what or name in names or what not in ALIASES:
        return name
    found = [each for each in names if _bare(each) in ALIASES[what]] or [
        each for each in names if is_rarer(each, what)
    ]
    if len(found) > 1:
        raise DataError(
            f"no column {what!r}, and several could be it: {', '.join(map(repr, found))}. Pass --{_option(what)} with the right one."
        )
    return found[0] if found else name


def is_rarer(name: object, what: str) -> bool:
    """
    Whether a column may be the user, item or time only where no more usual name is there.

    Example:
        >>> is_rarer("Order Date", "timestamp"), is_rarer("date", "timestamp")
        (True, False)
    """
    return isinstance(name, str) and _bare(name) in RARER.get(what, ())


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def named_otherwise(absent: Iterable[str], columns: Iterable = ()) -> str:
    """
    What to do where columns have unusual names, a sentence.

    Args:
        absent: their default names; the columns are not in the table.
        columns: of the table.

    Example:
        >>> named_otherwise(["user_id"])
        'Pass --user_column with the right one.'
        >>> named_otherwise(["item_id", "timestamp"])
        'Pass --item_column and --timestamp_column with the right ones (--timestamp_column none: the rows of a user are in the order of time).'
    """
    # Sessions have no option on the command line.
    options = [f"--{_option(what)}" if what in ALIASES else _option(what) for what in absent]
    # The place of a row would take the name of a column that is there.
    orders = "timestamp" in absent and "timestamp" not in columns
    untimed = " (--timestamp_column none: the rows of a user are in the order of time)" if orders else ""
    return f"Pass {' and '.join(options)} with the right one{'s' if len(options) > 1 else ''}{untimed}."


def _option(what: str) -> str:
    return f"{what.removesuffix('_id')}_column"
