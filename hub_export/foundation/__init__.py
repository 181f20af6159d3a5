"""The frozen base model: where it is, its tensors, and the names that transformers and PEFT convert.

Read `reference` first: it finds the foundation and checks that experts fit it. `weights` lists its tensors,
`weight_conversion` is transformers' own renaming, `stacked_experts` and `layer_names` are about the layers
that adapters may stand on, `last_position`, `quantised` and `whole_weights` about one property each.
"""
