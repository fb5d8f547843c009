"""The page `/docs`: the request schema as tables and a form to try it, in one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; background: #fff }
h2 { margin-top: 2.5rem; font-size: 1.15rem } code, pre, textarea, input { font: 14px/1.4 ui-monospace, monospace }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #d6dade }
textarea, input, pre { box-sizing: border-box; width: 100%; padding: .6rem; border: 1px solid #b5bcc4; border-radius: 4px }
pre { background: #f4f6f8; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere } button { margin: .6rem 0; padding: .5rem 1.2rem; font: inherit }
@media (prefers-color-scheme: dark) { body { color: #e6e9ec; background: #14171a } pre, textarea, input { background: #1f2429; color: inherit } }
"""
_SCRIPT = """
document.getElementById("send").onclick = async () => {
  const show = document.getElementById("answer"), token = document.getElementById("token").value;
  const headers = {"Content-Type": "application/json"};
  if (token) headers.Authorization = "Bearer " + token;
  show.textContent = "...";
  try {
    const response = await fetch("recommend", {method: "POST", headers, body: document.getElementById("body").value});
    const text = await response.text();
    let shown = text;
    try { shown = JSON.stringify(JSON.parse(text), null, 1); } catch {}
    show.textContent = response.status + "\\n" + shown;
  } catch (error) { show.textContent = String(error); }
};
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


#: The page's Content-Security-Policy: its own style and script, and requests to its own server.
POLICY = (
    f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def page(schema: dict[str, Any]) -> str:
    """
    The page as HTML.

    Args:
        schema: the OpenAPI schema of the application.

    Example:
        >>> "<h1>my &lt;server&gt;" in page({"info": {"title": "my <server>", "description": "", "version": "1"}, "paths": {}, "components": {}})
        True
    """
    models = schema["components"].get("schemas", {})
    routes = [
        (f"<code>{method.upper()} {escape(path)}</code>", escape(operation.get("description", "")))
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    responses = schema["paths"].get("/recommend", {}).get("post", {}).get("responses", {})
    statuses = [(f"<code>{escape(status)}</code>", escape(each["description"])) for status, each in responses.items()]
    query = models.get("Query", {})
    example = json.dumps(query.get("examples", [{}])[0], indent=1)
    info = schema["info"]
    parts = [
        f"<h1>{escape(info['title'])}</h1><p>{escape(info['description'])} Version {escape(info['version'])}. The full schema is "
        '<a href="openapi.json">openapi.json</a>.</p>',
        "<h2>Routes</h2>",
        _table(("route", ""), routes),
        "<h2>Request to /recommend: an object, or a list of objects</h2>",
        _table(("key", "type", "default", ""), _fields(query)),
        "<h2>Answer: an object, or a list in the same order</h2>",
        _table(("key", "type", "default", ""), _fields(models.get("Answer", {}))),
        "<h2>Request to /similar</h2>",
        _table(("key", "type", "default", ""), _fields(models.get("SimilarQuery", {}))),
        "<h2>Answer of /similar: a list of objects, one per item</h2>",
        _table(("key", "type", "default", ""), _fields(models.get("SimilarAnswer", {}))),
        "<h2>Statuses of /recommend and /similar</h2>",
        _table(("status", ""), statuses),
        "<h2>Try it</h2>",
        f'<p><textarea id="body" rows="8" aria-label="request" spellcheck="false">{escape(example)}</textarea></p>',
        '<p><input id="token" type="password" placeholder="token, if the server has one" aria-label="token" autocomplete="off"></p>',
        '<p><button id="send">POST /recommend</button></p><pre id="answer" aria-live="polite"></pre>',
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head><body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>"
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of cells that are HTML already."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _fields(model: dict[str, Any]) -> list[tuple[str, ...]]:
    required = model.get("required", ())
    rows = []
    for name, each in model.get("properties", {}).items():
        default = "required" if name in required else json.dumps(each["default"]) if "default" in each else "none"
        default = "none" if default == "null" else default
        rows.append(
            (f"<code>{escape(name)}</code>", escape(_type(each)), escape(default), escape(each.get("description", "")))
        )
    return rows


def _type(each: dict[str, Any]) -> str:
    """A property's type in words: `list of integer or string`."""
    if "anyOf" in each:
        return " or ".join(dict.fromkeys(_type(part) for part in each["anyOf"] if part.get("type") != "null"))
    kind = each.get("type", "any")
    return f"list of {_type(each.get('items', {}))}" if kind == "array" else kind
