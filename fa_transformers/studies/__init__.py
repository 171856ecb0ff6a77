"""Benchmarks and comparisons that prove the claims, run by `scripts/studies/`.

A contender is a row of a study; a baseline is what needs no training of ours, such as word counts.

benchmark            one model, mode and size, measured in a process of its own
benchmark_run        a benchmark's options, its points and their measurement; _report and _charts: what it leaves
contenders           FA models, truncation, chunk-and-mean and word counts at equal tokens; contenders_report
folds                cross-validation that cuts no group of documents
conversion_ablation  parts of a layer that restore a converted model
from_scratch         training on generated tasks; long_range_arena: two of them
operator_timing      the operator beside the memory floor of a device
explain_benchmark    time and memory of explanations beside a forward pass and dense rollout
peak_memory          measured memory beside the estimate, and the longest text that trains
"""
