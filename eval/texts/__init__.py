"""Texts as the measure of a mixture: what is read, how it is cut into tokens, and what follows from it.

`reading` finds texts in files and folders, and `encoding` makes token ids of them, with what counts. `loss` measures
held-out texts under every routing strategy: `text_losses` computes, `loss_figures` says what follows.
"""
