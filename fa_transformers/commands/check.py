"""The command that checks a published model folder; nothing is sent anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..redaction import redact
from .flags import FlagParser, how_started, mistakes_in_one_line, print_json


@dataclass(frozen=True)
class CheckCommand:
    """A parsed command line of a check."""

    folder: str
    write: bool
    as_json: bool


def parse(argv: Sequence[str] | None = None) -> CheckCommand:
    """Parse the flags."""
    program = how_started("check", "-m fa_transformers.commands.check", launcher="python")
    parser = FlagParser(
        program,
        "Load a model folder in a process of its own, offline, and check it: files, outputs, and its weights by "
        "padding, batches, chunks, packing and precision.",
        f"{program} outputs/mine",
    )
    parser.add_argument("folder", metavar="FOLDER", help="model folder written by fa_transformers.publish")
    parser.add_argument("--write", action="store_true", help="write what is found to the folder's certificate and card")
    parser.add_argument("--json", action="store_true", help="print one line of JSON in the place of the table")
    given = parser.parse(argv).given
    return CheckCommand(given["folder"], given.get("write", False), given.get("json", False))


def main(argv: Sequence[str] | None = None) -> dict:
    """Check as the flags say; prints the certificate. A check that failed ends the process with exit status 1, a folder
    that can't be checked with 2."""
    run = parse(argv)
    from ..hub.publish import examine_folder, write_certificate

    with mistakes_in_one_line():
        found = examine_folder(run.folder)
        result = found.self_test | {"certificate": found.certificate.to_list()}
        if run.as_json:
            print_json(result)
        else:
            print(redact(f"{found.certificate.table()}\n"))
        if run.write:
            write_certificate(run.folder, found.certificate)
    mistakes = found.certificate.failures if run.write else found.mistakes
    if mistakes:
        raise SystemExit(redact(f"error: {run.folder} failed its check: {'; '.join(mistakes)}"))
    if not run.as_json:
        has_none = found.stated is None and not run.write
        hint = "; it has no certificate: --write puts this one there" if has_none else ""
        print(redact(f"{run.folder} passed: {found.self_test['model_class']}, {found.self_test['files']} files{hint}"))
    return result


if __name__ == "__main__":
    main()
