"""A router for experts that are trained already: the gate fitted to texts, everything else frozen.

Read `fit_router` first: from a repo and texts to a repo with a router. `options` is what may be chosen,
`training_texts` the texts and the share that is held out. `router_states` reads, once, what the gate will read;
`objectives` are the two losses, `gate_training` is the optimiser's loop, and `held_out` says in nats a token what
came of it. `processes` is how several processes share the texts.
"""
