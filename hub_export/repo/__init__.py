"""What an exported repo is made of.

Read `plan` first: what an export is going to write. `writer` writes weights, config and code, `model_card`
the card, `checksums` SHA256SUMS. `repo_config` and `repo_files` say of a folder whether it is a repo and which
files belong to it. `router_prompts` makes a router from example prompts, `results` reads EvalPlus's result
files, `eval_results` writes the scores as the Hub reads them, and `stale_scores` takes them out again.
"""
