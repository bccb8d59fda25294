"""The HTTP server: OpenAI's endpoints, a few more, and a page to watch them by."""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the server needs {error.name}, which is not installed; get it with: pip install 'mini-infer[serve]'",
        name=error.name,
    ) from error

from mini_infer.serving.app import create_app
from mini_infer.serving.server import serve

__all__ = ["create_app", "serve"]
