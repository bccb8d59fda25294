"""One engine in a process of its own, asked through a pipe. Nothing here imports Mini-Infer, except `ours`."""
