"""Every place that touches EvalPlus's prompts, data and files.

Read `decoder` first: EvalPlus's own loop around a model that is asked in batches. `data` is its data sets and
expected outputs, `stock` its unmodified commands and result files, `tokenizer_round_trip` what a tokenizer
does to its texts.
"""
