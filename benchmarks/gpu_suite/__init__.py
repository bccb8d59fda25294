"""Everything that only a GPU can show, in one command: ``python -m benchmarks.gpu_suite``.

Needs Mini-Infer's own dependencies and nothing else. Each section runs in a process of its own, so that one that fails,
hangs or upsets the device costs only itself.
"""
