"""Where a source comes from: a folder, the Hub or W&B, all of which end as an open folder of this machine.

Read `source_folder` first: `open_folder` is the door to every folder that a command reads. `hub_and_folders`
turns what a user calls a source into one, `wandb_artifacts` fetches artifacts and `hub_errors` explains the
Hub's errors. `source_options` is what a user may say about a source. `json_files` and `text_files` read text whole,
up to a size.
"""
