"""``/docs``: every endpoint and field on one plain page, made from the OpenAPI schema; it needs no other host."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 0 auto; padding: 1rem; }}
code {{ font-family: ui-monospace, monospace; }}
table {{ border-collapse: collapse; width: 100%; }}
td {{ border-top: 1px solid #8886; padding: .2rem .8rem .2rem 0; vertical-align: top; }}
</style></head><body><h1>{title}</h1>
<p>{description} The same for programs: <a href="openapi.json">openapi.json</a>.</p>
{endpoints}</body></html>"""


def reference_page(schema: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI schema's endpoints, and of the fields of their bodies."""
    endpoints = (
        _endpoint(schema, method, path, operation)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    )
    info = schema["info"]
    return _PAGE.format(
        title=escape(info["title"]), description=escape(info["description"]), endpoints="\n".join(endpoints)
    )


def _endpoint(schema: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> str:
    heading = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.</p>"
    if "requestBody" not in operation:
        return heading
    body = _resolved(schema, operation["requestBody"]["content"]["application/json"]["schema"])
    return f"{heading}<table>{''.join(_rows(schema, body))}</table>"


def _rows(schema: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[str]:
    for name, field in body["properties"].items():
        needed = " (required)" if name in body.get("required", ()) else ""
        cells = (f"<code>{escape(name)}</code>", escape(_kind(schema, field)) + needed)
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{escape(field.get('description', ''))}</td></tr>"


def _kind(schema: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    field = _resolved(schema, field)
    if "anyOf" in field:
        return " or ".join(kind for kind in (_kind(schema, choice) for choice in field["anyOf"]) if kind != "null")
    if field.get("type") == "array":
        return f"list of {_kind(schema, field['items'])}"
    return " or ".join(map(repr, field["enum"])) if "enum" in field else str(field.get("type", "anything"))


def _resolved(schema: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a reference to where it points."""
    reference = part.get("$ref")
    return schema["components"]["schemas"][reference.rsplit("/", 1)[1]] if reference else part
