"""Predict labels or numbers for texts or images with a trained model, and write a table.

python scripts/predict.py outputs/mine texts.csv --output predictions.csv
python scripts/predict.py outputs/mine letters/ --output predictions.parquet     # a folder of .txt, or of images
python scripts/predict.py outputs/mine labelled.csv --report_lengths 512 2048 8192

Rows that can't be used stand in the table with the reason. A stopped run goes on with --resume.
"""

from fa_transformers.commands.flags import mistakes_in_one_line
from fa_transformers.commands.predict import main

if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
