"""Checking programs that a model wrote.

Read `scoring` first: EvalPlus's verdict on every sample. `check_workers` keeps checking processes at work,
`checking_process` is one of them seen from outside and `guarded_check` what runs in it, `restrictions` and
`sandbox` are what a program may not do, `shortage` says what the machine lacks, and `sanitizing` cuts samples
to programs.
"""
