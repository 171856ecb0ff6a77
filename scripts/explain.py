"""Show which passages of a document, or regions of an image, a trained model's answer rests on, as a page.

python scripts/explain.py outputs/mine judgment.txt --output_dir pages
python scripts/explain.py outputs/mine judgment.pdf --output_dir pages --passage 200     # of 200 tokens each
python scripts/explain.py outputs/images scan.png --output_dir pages --method gradient_x_input --json

The page needs no network and no other file. A table's rows, or a folder's files, are explained by
`scripts/predict.py --explain FOLDER`.
"""

from fa_transformers.commands.explain import main
from fa_transformers.commands.flags import mistakes_in_one_line

if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
