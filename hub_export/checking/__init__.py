"""Does a repo compute what its source computes?

Read `check` first: the comparison after an export. `check_source` computes one side by PEFT from the raw
files, `check_repo` the other in a process that knows the repo alone, `rounding` how far they may lie apart.
`verify` is the command on a finished repo, and `own_code` runs its weights under this package's code.
"""
