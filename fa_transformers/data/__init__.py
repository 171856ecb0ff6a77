"""Data from files to batches; each module is imported by its full name.

readers/            a user's own files, tables, image folders and streams, checked row by row
boxes_and_masks     geometry of boxes and masks: pure functions
augment             random views of pictures with objects: augment
sets/               data sets that come with the package
facts               what a model card says of a data set: DataFacts
labelled            what the options name or what is given in Python, read and checked: LabelledData, load_data
tokenizing          documents -> tokens, in parallel and cached: tokenize_documents
text_prefixes       the beginnings of long texts that have the tokens of the whole
examples            rows of a split and their lengths: TextExamples, ImageExamples, build_examples
collators, batching, streaming
                    examples into batches of similar length, packed or padded, in memory or streamed
word_counts         what to beat without a network: tfidf_baseline, tfidf_predictions
"""
