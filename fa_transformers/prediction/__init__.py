"""Answers of a trained classifier or regressor to texts and images of any number and length.

answers     From logits to labels and scores, and how they stand in a table; fine-tuning's tables have them, too.
inputs      From texts and images to batches under a token budget.
loading     A model folder and its processor, or in one line why it can't be used.
predictor   `Predictor`, which ties these together.
lengths     Scores when only the beginning of each document is read.
sources     Rows of a file, or the files of a folder, one at a time.
output      The table that is written, which a stopped run goes on with.
run         All of it for one file or folder.
explanation The ground of one answer, as values.
explaining  Their computation for a document or an image.
"""
