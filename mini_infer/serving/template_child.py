"""Renders chat templates in a process of its own, which can be killed: a template is a program, and may have no end.

Run by its path, so that nothing of this package is imported. Each line of the standard input is a request in JSON, each
line of the standard output its answer; the first line says that it is ready.
"""

import json
import sys
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space, where the system can limit that."""


def main() -> None:
    sys.path.pop(0)  # this file's directory, whose modules are not for import
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not here
    sys.modules["torch"] = None  # type: ignore[assignment]  # templates need none of it, and it is large
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(template: str, variables: dict[str, Any], most: int) -> dict[str, str]:
        messages = variables.pop("messages")
        try:
            rendered: Any = render_jinja_template(conversations=[messages], chat_template=template, **variables)
        except Exception as error:
            return {"error": str(error)[:1000] or type(error).__name__}
        text: str = rendered[0][0]
        if len(text) > most:
            return {"error": f"it makes {len(text)} characters of them; at most {most} are taken"}
        return {"text": text}

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(render(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
