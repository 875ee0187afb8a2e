"""bcft: behaviour cloning of language models, plain and filtered, that can be trusted."""

__version__ = "0.1.0"
