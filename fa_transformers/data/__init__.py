"""Data from files to batches; each module is imported by its full name.

readers/            a user's own files, tables, image folders and streams, checked row by row
sets/               data sets that come with the package
facts               what a model card says of a data set: DataFacts
labelled            what the flags name, read and checked: LabelledData, load_data
collators, batching, streaming
                    examples into batches of similar length, packed or padded, in memory or streamed
word_counts         what to beat without a network: majority_baseline, tfidf_baseline, tfidf_predictions
"""
