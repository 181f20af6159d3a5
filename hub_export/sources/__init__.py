"""Where a source comes from: a folder, the Hub or W&B, all of which end as a folder of this machine.

Read `hub_and_folders` first: `resolve_source` turns what a user calls a source into a `Source`.
`wandb_artifacts` fetches artifacts through the wandb SDK; `hub_errors` says what went wrong on the Hub in one
line each.
"""
