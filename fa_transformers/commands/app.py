"""The command that serves the app; `scripts/app.py` starts it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..options import OptionGroup, option
from .flags import FlagParser, how_started, mistakes_in_one_line

LARGEST_PORT = 65535


@dataclass(frozen=True)
class AppOptions(OptionGroup):
    """Where the app is served."""

    host: str = option(
        "127.0.0.1", "address to listen at; 0.0.0.0 = for all who can reach this machine", group="app", common=True
    )
    port: int = option(7860, "port to listen at", group="app", common=True)


@dataclass(frozen=True)
class AppCommand:
    """A parsed command line of the app."""

    models: tuple[str, ...]
    options: AppOptions


def parse(argv: Sequence[str] | None = None) -> AppCommand:
    """Parse the flags."""
    program = how_started("app", "scripts/app.py", launcher="python")
    parser = FlagParser(
        program,
        "Serve an app that explains answers to documents and images and compares texts, in the browser, without a "
        "request to any other host. Without MODEL it takes the models of `make demo` and `make images`, or trains "
        "small ones first.",
        f"{program} outputs/mine",
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="folder or repository of the Hub: one of texts, one of images, or both",
    )
    parser.add_options(AppOptions, ("app",), "server")
    parsed = parser.parse(argv)
    options = parsed[AppOptions]
    if not 1 <= options.port <= LARGEST_PORT:
        parsed.fail(f"--port must be from 1 to {LARGEST_PORT}, got {options.port}")
    return AppCommand(tuple(parsed.given["models"]), options)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the app until it is stopped."""
    run = parse(argv)
    from ..app.server import serve

    serve(run.models, host=run.options.host, port=run.options.port)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
