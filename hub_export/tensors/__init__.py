"""Lazily read tensor files, and the `Mixture` that they make.

Read `mixture` first: what every reader produces and an export consumes. `tensor_files` opens safetensors and
PyTorch files, `stored_tensors` is a tensor that is read when it is needed, `containment` keeps reading inside
the folder that was given.
"""
