"""A page to look at a mixture with: a prompt in, the completion coloured by expert as it streams.

Read `sides` first: one prompt under one strategy or two. `streaming` runs `generate`, `routing` reads what the experts
count for, `completion` keeps the text, `shown` writes it as HTML, and `page` is Gradio's part. `space` writes the
folder that the Hub runs, with copies of these files, so they import torch, transformers and Gradio alone;
`space_app` runs there, and `serving` here.
"""
