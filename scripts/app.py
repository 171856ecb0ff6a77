"""Serve an app in the browser that explains answers to documents and images, and compares texts; offline.

python scripts/app.py                                        # the demo's models, or small ones that it trains first
python scripts/app.py outputs/letters                        # a model of yours
python scripts/app.py outputs/letters outputs/scans --host 0.0.0.0 --port 8080

Needs the extra "app" (pip install -e '.[app]'). Ctrl-C stops it.
"""

from fa_transformers.commands.app import main
from fa_transformers.commands.flags import mistakes_in_one_line

if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
