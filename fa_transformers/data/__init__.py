"""Data sets and checked reading of a user's own files; each module is imported by its full name.

license_documents   long legal documents from a pip package: load_license_documents
broad_text          unlabelled prose of installed packages, to distil on: load_broad_text
listops, pathfinder two tasks of Long Range Arena, drawn by its rules: load_listops, load_pathfinder
needle              documents whose label needs both of their ends: NeedleDocuments
digit_canvas        generated images of 1,024 px and more, made from real handwritten digits: load_digit_canvas
files               csv, json, jsonl, parquet: load_text_files, encode_dataset, tokenize_documents, DataError
tables              what `files` reads with: one file or split, and where each row stands
images              folders of images: load_image_folder, open_image, convert_image
baselines           what to beat: majority_baseline, tfidf_baseline, tfidf_predictions
"""
