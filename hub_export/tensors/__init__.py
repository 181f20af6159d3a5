"""Lazily read tensor files, and the `Mixture` that they make.

Read `mixture` first: what every reader makes and an export writes. `tensor_files` opens safetensors and PyTorch
files, once `pickle_limits` has seen how much the latter unfold to; `weight_files` finds those of a model,
`stored_tensors` is a tensor that is read when it is needed. `subtraction` makes experts that are differences of two.
"""
