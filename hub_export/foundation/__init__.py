"""The frozen base model: where it is, its tensors, and the names that transformers and PEFT convert.

Read `reference` first: it finds the foundation and checks that experts fit it. `weights` lists its tensors,
`weight_conversion` is transformers' own renaming, `stacked_experts` and `layer_names` are about the layers
that adapters may adapt, `last_position` and `quantised` about one property of a base model each, and
`copied_weights` about copies of its tensors in an adapter's file.
"""
