from core import idle_threads  # noqa: F401  # before any module of this package imports torch
