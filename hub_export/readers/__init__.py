"""One file for each checkpoint format, from an open folder to a `Mixture`.

Read `open_source` first: it opens what a user calls a source. `detect` asks every reader whether it knows a
folder (to add a format, write a reader and list it there), and `choice` picks one of several checkpoints of a
run. `training_run`, `peft_fields`, `patterns`, `adalora` and `whole_foundation` are parts of readers.
"""
