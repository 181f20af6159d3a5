"""Checking programs that a model wrote.

Read `scoring` first: EvalPlus's verdict on every sample. `check_workers` keeps checking processes at work,
`guarded_check` is such a process, `restrictions` and `sandbox` are what a program may not do, `shortage` says
what the machine lacks, and `sanitizing` cuts samples to programs.
"""
