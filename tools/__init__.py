import support.threads  # noqa: F401  (before torch, which each tool imports)
