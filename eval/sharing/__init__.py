"""Results in the forms of places where they are shared: the Every Eval Ever schema, and W&B Weave.

Read `task_rows` first: every sample of a scored run, with its prompt and verdicts. `every_eval_ever` writes the rows
as files, `weave_rows` sends them.
"""
