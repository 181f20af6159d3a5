"""The tokenizer of a repo: found in the source or beside the foundation, loaded, compared, and written.

Read `tokenizer` first. `tokenizer_files` says which files a tokenizer has and loads them, `tokenizer_arguments`
which fields of them are believed, `tokenizer_trial` loads an unknown one in a confined process before this one
does, and `tokenizer_comparison` compares two on a fixed set of texts.
"""
