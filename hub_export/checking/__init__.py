"""Does a repo compute what its source computes?

Read `check` first: the comparison after an export. `check_source` reads one side from the raw files (adapters by
`peft_layers`, computed by `peft_reference`; a router in every layer by `check_arrow`), `check_repo` computes the
other in a process that knows the repo alone, `comparison` and `rounding` say how far they may lie apart. `verify`
and `verify_tokenizer` are the command on a finished repo; `own_code` runs a repo's weights under this package's code, and
`model_size` says first if a model is as large as its files.
"""
