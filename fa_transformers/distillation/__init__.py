"""Recovery of a converted model, which learns from the softmax model that its weights came from.

recipes             defaults by task and recipe, in the standard library alone
job                 a distillation's options, its plan, and its result
checks              mistakes in the options, named before they cost time
student             the student and the teacher, made from their checkpoints
unlabelled, pieces  documents and images, read and held out; cut into pieces that a teacher can read
objectives          what is minimised: attention transfer, and end-to-end distillation
stages              the objectives in order, each trained for steps of its own
plan                what `--dry_run` tells of them
embeddings, probing, comparison
                    how near the student is to its teacher, and what both are worth downstream
receipt, card_facts the results as JSON and tables, and as facts of a model card
distill             all of it in order: `distill(...)`
"""
