"""The commands: `fa-transformers finetune|distill|convert|predict|explain|app|check|push`; scripts: all but check.

Each command's module parses its flags into options before it imports what needs torch.
"""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "finetune": "fine-tune a model on your documents or images, score it, write a folder ready to publish",
    "distill": "recover a converted model: it learns from the softmax model that its weights came from",
    "convert": "convert a pretrained text or image encoder to factorized attention",
    "predict": "predict for a table, a document, images or a folder with a trained model, and write a table",
    "explain": "show which passages of a document, or regions of an image, an answer rests on, as a page",
    "app": "serve an app in the browser that explains answers and compares texts, offline",
    "check": "check a model folder: files, outputs, padding, chunks, packing, precision",
    "finetune_dense": "train a detector or an instance segmenter on pictures with objects, score it, write its folder",
    "finetune_stereo": "train a stereo network on rectified pairs with disparities, score it, write its folder",
    "push": "check a model folder, upload it to the Hub and load it back",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names, with the rest of the words as its flags."""
    from difflib import get_close_matches

    from ..version import __version__

    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name == "--version":
        print(f"fa_transformers {__version__}")
    elif name in ("-h", "--help"):
        listing = "\n".join(f"  {command:10}{what}" for command, what in COMMANDS.items())
        usage = "usage: fa-transformers COMMAND [flags]"
        print(f"{usage}\n\ncommands:\n{listing}\n\nfa-transformers COMMAND --help says more.")
    elif name in COMMANDS:
        from .flags import mistakes_in_one_line

        with mistakes_in_one_line():
            importlib.import_module(f".{name}", __name__).main(words[1:])
    else:
        guess = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {guess[0]}?" if guess else f"it is one of {', '.join(COMMANDS)}"
        from .flags import CommandFailed

        message = f"error: unknown command {name!r}: {hint}"
        print(message, file=sys.stderr)
        raise CommandFailed(message)
