"""From a model to a samples file.

Read `make_samples` first: one samples file from beginning to end. `loading` finds and loads any source,
`batch_decoding` decodes many prompts at once, and `vllm_decoding` does by vLLM's engine; `sample_journal` keeps what
is finished, `run_record` says what a run was.
"""
