"""The commands of `python -m expface_kernels`, a module each.

Each has `add_parser(subparsers)` and `main(options) -> int`; expface_kernels.__main__ lists and loads them.
They print with rich, which the package itself does without.
"""
