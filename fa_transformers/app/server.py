"""The start of the app, and what is switched off for it: nothing here asks another host for anything."""

import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",  # which also looks for newer versions
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SHARE": "False",
    "GRADIO_ALLOWED_PATHS": "",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
}
"""Variables that Gradio and huggingface_hub read when they are imported."""
HOST, PORT = "127.0.0.1", 7860
STYLE = Path(__file__).parent / "style.css"


def serve(models: Sequence[str] = (), *, host: str = HOST, port: int = PORT) -> None:
    """Start the app and serve it until the process is stopped.

    Args:
        models: folders or repositories, as in `models.find_models`.
        host: address to listen at: 127.0.0.1 is for this machine alone, 0.0.0.0 for all that can reach it.
        port: to listen at.

    Raises:
        ImportError: Gradio is not installed.
        AppError, SourceError: a model can't be used.
        OSError: the port is taken.
    """
    check_port(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that uploads are deleted
    # Uploads go to a folder that the owner of this process alone can read, instead of one that all users share; Gradio
    # reads its name, as it does all of these variables, when it is imported.
    with tempfile.TemporaryDirectory(prefix="fa-transformers-app-") as folder:
        os.environ.update(QUIET | {"GRADIO_TEMP_DIR": folder})
        _serve(models, host, port, Path(folder))


def _serve(models: Sequence[str], host: str, port: int, folder: Path) -> None:
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ImportError('the app needs Gradio: pip install "fa_transformers[app]"') from error
    from starlette.middleware import Middleware

    from .gate import Gate
    from .interface import TITLE, build_interface
    from .models import find_models
    from .page_store import PageStore
    from .requests import Requests
    from .uploads import MAX_FILE_BYTES

    found = find_models(models)
    pages = PageStore()
    blocks = build_interface(found, Requests(found, pages))
    print(f"Starting {TITLE} at http://{host}:{port} (Ctrl-C stops it)", flush=True)
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=False,
        max_file_size=MAX_FILE_BYTES,
        app_kwargs={
            "middleware": [Middleware(Gate, upload_folder=folder, pages=pages)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=STYLE,
        footer_links=[],
        pwa=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )


def check_port(host: str, port: int) -> None:
    """Raise AppError unless the port can be listened at, before models are trained for nothing."""
    from .models import AppError

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AppError(f"--host {host} --port {port} can't be listened at: {error.strerror or error}") from error
