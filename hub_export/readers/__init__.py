"""Readers, one file for each checkpoint format, from an open folder to a `Mixture`; and parts that they share.

Read `open_source` first: it opens what a user calls a source. `detect` asks every reader whether it knows a
folder (to add a format, write a reader and list it there), and `choice` picks one of several checkpoints of a
run. `training_run`, `peft_fields`, `adalora` and `whole_model_foundation` are parts of readers.
"""
