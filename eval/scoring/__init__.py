"""Checking programs that a model wrote.

Read `scoring` first: EvalPlus's verdict on every sample. `check_workers` keeps checking processes at work,
`checking_process` is one of them seen from outside and `guarded_check` what runs in it. A program is restricted
by `hub_export.restrictions` and `syscall_filter`, and with `--sandbox` by `sandbox` (bubblewrap) as well;
`process_state` notices what it changed nevertheless. `shortage` says what the machine lacks, and `sanitizing`
cuts samples to programs.
"""
