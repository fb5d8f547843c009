"""How the tests read a card: its snippet, sections, headings and tables; and names that would like to be markup."""

import re

HOSTILE = [
    "<script>alert(1)</script>",
    "a: [b, {c}] # d",
    "yes",
    "{{ 7 * 7 }} {% raw %}",
    "x|y `z` *w* _v_ [u](http://evil) ![t](s) ~~r~~ $q$",
    "one\n# two\n---\nthree",
    "'quoted' \"twice\" \\ & co",
    "日本語 é",
]


def run_snippet(card):
    """Executes the one Python block; gives its names."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.S | re.M)
    scope = {}
    exec(snippet, scope)
    return scope


def section(card, name):
    return card.split(f"\n## {name}\n")[1].split("\n## ")[0]


def headings(card):
    return [line for line in card.splitlines() if line.startswith("#")]


def table_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]
